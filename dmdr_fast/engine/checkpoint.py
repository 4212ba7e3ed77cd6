"""Checkpoints: written aside, checksummed, renamed; a torn or altered one is refused and the one before it used.

Layout of ``run_dir/checkpoints/step_00000120``::

    generator/, fake/     weights, optimizer and EMA part by part, for any number of ranks (``dmdr_fast.engine.state``)
    random.00000.json     random states of that rank
    trainer.json          step, counters, what the run is made of
    manifest.json         size and SHA-256 of every other file; its presence says that the checkpoint is whole

Only files of the manifest are read, and none of them is unpickled, but 8-bit moments by torch's restricted loader.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from dmdr_fast.config import Config
from dmdr_fast.disk import Writes
from dmdr_fast.engine.identity import differences, other_run
from dmdr_fast.engine.random_state import random_state, set_random_state
from dmdr_fast.engine.roles import AdapterRole, TrainedRole
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.engine.shards import EMA
from dmdr_fast.engine.state import StoredRole, load_role, save_role
from dmdr_fast.errors import RunEnded, UserError

MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{8})")
WEIGHT = "weight.00000.safetensors"
COUNTERS = {"skipped", "skipped_in_a_row", "beyond", "reward_weight"}
# What reading a file with another content than ours raises, of JSON, safetensors, base64, random states and tensors.
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(SafetensorError, pickle.UnpicklingError),
)


@dataclass(frozen=True)
class Trained:
    """Everything that a checkpoint holds."""

    roles: Mapping[str, TrainedRole | AdapterRole]
    ema: EMA | None  # the generator's


class CheckpointFolder:
    """The checkpoints of one run; ``settings`` (``dmdr_fast.engine.identity``) says what the run is made of."""

    def __init__(self, config: Config, settings: dict[str, Any], runtime: Runtime) -> None:
        self.folder, self.settings, self.runtime = config.run_dir / "checkpoints", settings, runtime
        self.kept, self.cold_start = config.checkpoint, config.train.cold_start_steps
        self.refused: list[Path] = []  # by find

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := NAME.fullmatch(p.name)))

    def save(self, step: int, trained: Trained, counters: dict[str, Any], rewards: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and drop the oldest beyond ``checkpoint.keep``. All ranks must call.

        Raises:
            RunEnded: the disk of a rank refuses it; those that were there before are whole.
        """
        final, aside = self.folder / f"step_{step:08d}", self.folder / f".step_{step:08d}.partial"
        ranks, write = self.runtime, Writes()
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            write(partial(aside.mkdir, parents=True))
        ranks.barrier()
        for name, role in trained.roles.items():
            save_role(aside / name, role, trained.ema if name == "generator" else None, ranks, write)
        write(partial((aside / f"random.{ranks.rank:05d}.json").write_text, json.dumps(random_state())))
        if ranks.is_main:
            state = {"step": step, "settings": self.settings, "counters": counters, "rewards": rewards}
            write(partial((aside / "trainer.json").write_text, json.dumps(state, indent=1)))
        ranks.barrier()
        digests = write(partial(self._digests, aside)) or {}
        parts = ranks.gather((digests, write.fault))
        if ranks.is_main and not any(fault for _, fault in parts):
            write(partial(self._finish, aside, final, {k: v for part, _ in parts for k, v in part.items()}))
        if faults := [fault for part in (parts, ranks.gather((None, write.fault))) for _, fault in part if fault]:
            self._give_up(step, aside, faults[0])
        return final

    def _finish(self, aside: Path, final: Path, entries: dict[str, Any]) -> None:
        (aside / MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True))
        _sync(aside / MANIFEST)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(self.folder)
        for old in self.steps()[: -self.kept.keep]:
            if not self._stays(old):
                shutil.rmtree(self.folder / f"step_{old:08d}")

    def _give_up(self, step: int, aside: Path, fault: str) -> NoReturn:
        if self.runtime.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        self.runtime.barrier()
        left = self.steps()
        newest = f"that of step {left[-1]} is whole" if left else "there is none before it"
        raise RunEnded(
            f"the checkpoint of step {step} cannot be written ({fault}); {newest}. Free some space, and go on with "
            "--resume auto"
        )

    def _stays(self, step: int) -> bool:
        every = self.kept.keep_every
        return step == self.cold_start or (every is not None and step % every == 0)

    def find(self, resume: str) -> Path | None:
        """The checkpoint to start from: ``auto`` the newest good one, ``never`` none, else the one at that path.

        Raises:
            UserError: the named checkpoint is missing or damaged, or was written by another kind of run.
        """
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UserError(f"run_dir: {self.folder} is no folder; move it away, or name another run_dir")
        if resume == "never":
            return None
        if resume != "auto":
            path = Path(resume)
            fault = shared_fault(path, self.runtime)
            if fault:
                raise UserError(f"resume: {path} cannot be used: {fault}; name another checkpoint, or auto")
            self._check_identity(path)
            return path
        for step in reversed(self.steps()):
            path = self.folder / f"step_{step:08d}"
            fault = shared_fault(path, self.runtime)
            if fault is None:
                self._check_identity(path)
                return path
            self.refused.append(path)
            self.runtime.say(f"checkpoint {path} refused: {fault}; trying the one before it")
        if self.steps():
            raise UserError(
                f"resume: no good checkpoint in {self.folder}; set resume to never to start anew, or another run_dir"
            )
        return None

    def drop_after(self, step: int) -> None:
        """Remove checkpoints newer than the step that a run starts from: another lineage's, once it goes on.

        Those that :meth:`find` refused are renamed instead, as is what no run wrote (a file, a link) under such a name.
        """
        newer = [s for s in self.steps() if s > step]
        if newer and self.runtime.is_main:
            self.runtime.say(f"dropping checkpoints of steps {newer} in {self.folder}: the run starts from step {step}")
            for old in newer:
                path = self.folder / f"step_{old:08d}"
                if path in self.refused or path.is_symlink() or not path.is_dir():
                    path.rename(next(p for i in count(1) if not (p := Path(f"{path}.refused{i}")).exists()))
                else:
                    shutil.rmtree(path)
        self.runtime.barrier()

    def changes(self, path: Path) -> list[str]:
        """The settings that differ since a checkpoint that :meth:`find` returned: "log.every 10 -> 20" each."""
        return differences(self._read(path)["settings"], self.settings)

    def load(self, path: Path, trained: Trained) -> dict[str, Any]:
        """Restore everything from a checkpoint that :meth:`find` returned; {"step", "counters", "rewards"}.

        The number of ranks may be another one than the writer's; the random states, which nothing of ours reads, are
        then those of the writer's ranks in turn.

        Raises:
            UserError: a file has its checksum but not our content.
        """
        state = self._read(path)
        rank = self.runtime.rank % state["settings"]["ranks"]
        try:
            for name, role in trained.roles.items():
                load_role(stored_role(path, name), role, trained.ema if name == "generator" else None, self.runtime)
            set_random_state(json.loads((path / f"random.{rank:05d}.json").read_text()))
        except UNREADABLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"resume: {path} cannot be read ({reason}); name another checkpoint by --resume") from None
        return state

    def _read(self, path: Path) -> dict[str, Any]:
        return json.loads((path / "trainer.json").read_text())

    def _digests(self, folder: Path) -> dict[str, Any]:
        """Size and digest of this rank's share of the files; each is flushed to disk on the way."""
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
        share = files[self.runtime.rank :: self.runtime.world_size]
        return {str(p.relative_to(folder)): [p.stat().st_size, _sha256(p, flush=True)] for p in share}

    def _check_identity(self, path: Path) -> None:
        other = other_run(self._read(path)["settings"], self.settings)
        if other:
            raise UserError(
                f"resume: {path} was written with {'; '.join(other)}: set that back, or start another run in another "
                "run_dir, or here anew with --resume never"
            )


def shared_fault(path: Path, ranks: Runtime) -> str | None:
    """Why a checkpoint cannot be trusted, None when it can. Ranks share the reading; all get the same answer."""
    faults = [f for f in ranks.gather(fault(path, ranks.rank, ranks.world_size)) if f]
    return faults[0] if faults else None


def fault(path: Path, rank: int = 0, ranks: int = 1, *, prefixes: tuple[str, ...] = ("",)) -> str | None:
    """The same of one rank's share of the files; the checksums of those whose names begin so are looked at."""
    try:
        manifest = dict(json.loads((path / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return f"no readable {MANIFEST} in it" if path.is_dir() else "no such folder"
    if "trainer.json" not in manifest or "rank_00000.pt" in manifest:
        return "written by another version of dmdr_fast"
    for name in sorted(name for name in manifest if name.startswith(prefixes))[rank::ranks]:
        file = path / name
        try:
            found = [file.stat().st_size, _sha256(file)]
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            return f"{name} is missing"
        if found != manifest[name]:
            return f"{name} does not match its checksum"
    unlisted = sorted({str(p.relative_to(path)) for p in path.glob("*/*.safetensors")} - manifest.keys())
    return f"{unlisted[0]} is not in its {MANIFEST}" if unlisted else _content_fault(path, manifest)


def _content_fault(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """Whether trainer.json has what a run goes on with, for this very step, and each rank and role has its files."""
    try:
        state = json.loads((path / "trainer.json").read_text())
        step, counters, settings = state["step"], state["counters"], state["settings"]
        numbers = [step, *(counters[name] for name in counters.keys() - {"beyond", "reward_weight"})]
        numbers += counters.get("beyond", {}).values()
        right = all(type(n) is int and n >= 0 for n in numbers) and counters.keys() <= COUNTERS
        right &= {"teacher", "seed", "sharing"} <= settings.keys() and isinstance(state["rewards"], dict)
        files = {f"random.{rank:05d}.json" for rank in range(settings["ranks"])}
    except UNREADABLE:
        right = False
    if not right:
        return "its trainer.json is of another version of dmdr_fast"
    files |= {f"{role}/{name}" for role in ("generator", "fake") for name in ("parts.00000.json", WEIGHT)}
    if missing := sorted(files - manifest.keys()):
        return f"{missing[0]} is not in its {MANIFEST}"
    named = NAME.fullmatch(path.name)
    return f"its trainer.json is of step {step}" if named and int(named[1]) != step else None


def stored_role(path: Path, name: str) -> StoredRole:
    """The role ``name`` of a checkpoint, of the files that its manifest has."""
    files = json.loads((path / MANIFEST).read_text())
    return StoredRole(path / name, [file.partition("/")[2] for file in files if file.startswith(f"{name}/")])


def _sha256(path: Path, *, flush: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
