"""Checkpoints: written aside, checksummed, renamed; a torn or altered one is refused and the one before it used.

Layout of ``run_dir/checkpoints/step_00000120``::

    generator/, fake/     DeepSpeed's own files (weights, optimizer, per rank under ZeRO), or an adapter with its own
    rank_00000.pt         EMA shard, random states of that rank
    trainer.json          step, counters, what the run is made of
    manifest.json         size and SHA-256 of every other file; its presence says that the checkpoint is whole
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmdr_fast.engine.roles import AdapterRole, TrainedRole
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.engine.shards import EMA
from dmdr_fast.errors import UserError

MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Trained:
    """Everything that a checkpoint holds."""

    roles: Mapping[str, TrainedRole | AdapterRole]
    ema: EMA | None


class CheckpointFolder:
    """The checkpoints of one run. ``identity`` is what must not differ between the writer and the reader."""

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any], runtime: Runtime) -> None:
        self.folder, self.keep, self.identity, self.runtime = folder, keep, identity, runtime

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := NAME.fullmatch(p.name)))

    def save(self, step: int, trained: Trained, counters: dict[str, Any], rewards: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and drop the oldest beyond ``keep``. All ranks must call."""
        final, aside = self.folder / f"step_{step:08d}", self.folder / f".step_{step:08d}.partial"
        if self.runtime.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.runtime.barrier()
        for name, role in trained.roles.items():
            role.save(aside, name)
        torch.save(_rank_state(trained.ema), aside / f"rank_{self.runtime.rank:05d}.pt")
        if self.runtime.is_main:
            state = {"step": step, "identity": self.identity, "counters": counters, "rewards": rewards}
            (aside / "trainer.json").write_text(json.dumps(state, indent=1))
        self.runtime.barrier()
        entries = {k: v for part in self.runtime.gather(self._digests(aside)) for k, v in part.items()}
        if self.runtime.is_main:
            (aside / MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True))
            _sync(aside / MANIFEST)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            _sync(self.folder)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step_{old:08d}")
        self.runtime.barrier()
        return final

    def find(self, resume: str) -> Path | None:
        """The checkpoint to start from: ``auto`` the newest good one, ``never`` none, else the one at that path.

        Raises:
            UserError: the named checkpoint is missing or damaged, or was written by another kind of run.
        """
        if resume == "never":
            return None
        if resume != "auto":
            path = Path(resume)
            fault = self._fault(path)
            if fault:
                raise UserError(f"resume: {path} cannot be used: {fault}; name another checkpoint, or auto")
            self._check_identity(path)
            return path
        for step in reversed(self.steps()):
            path = self.folder / f"step_{step:08d}"
            fault = self._fault(path)
            if fault is None:
                self._check_identity(path)
                return path
            self.runtime.say(f"checkpoint {path} refused: {fault}; trying the one before it")
        if self.steps():
            raise UserError(
                f"resume: no good checkpoint in {self.folder}; set resume to never to start anew, or another run_dir"
            )
        return None

    def drop_after(self, step: int) -> None:
        """Remove checkpoints newer than the step that a run starts from: another lineage's, once it goes on."""
        newer = [s for s in self.steps() if s > step]
        if newer and self.runtime.is_main:
            self.runtime.say(f"dropping checkpoints of steps {newer} in {self.folder}: the run starts from step {step}")
            for old in newer:
                shutil.rmtree(self.folder / f"step_{old:08d}")
        self.runtime.barrier()

    def load(self, path: Path, trained: Trained) -> dict[str, Any]:
        """Restore everything from a checkpoint that :meth:`find` returned; {"step", "counters", "rewards"}."""
        for name, role in trained.roles.items():
            role.load(path, name)
        state = torch.load(path / f"rank_{self.runtime.rank:05d}.pt", map_location="cpu", weights_only=False)
        _restore_rank_state(state, trained.ema)
        return json.loads((path / "trainer.json").read_text())

    def _digests(self, folder: Path) -> dict[str, Any]:
        """Size and digest of this rank's share of the files; each is flushed to disk on the way."""
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
        share = files[self.runtime.rank :: self.runtime.world_size]
        return {str(p.relative_to(folder)): [p.stat().st_size, _sha256(p, flush=True)] for p in share}

    def _fault(self, path: Path) -> str | None:
        """Why a checkpoint cannot be trusted, None when it can. Ranks share the reading; all get the same answer."""
        faults = [f for f in self.runtime.gather(self._local_fault(path)) if f]
        return faults[0] if faults else None

    def _local_fault(self, path: Path) -> str | None:
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            names = sorted(manifest)
        except (OSError, ValueError, TypeError):
            return f"no readable {MANIFEST} in it" if path.is_dir() else "no such folder"
        for name in names[self.runtime.rank :: self.runtime.world_size]:
            file, expected = path / name, manifest[name]
            if not file.is_file():
                return f"{name} is missing"
            if [file.stat().st_size, _sha256(file)] != expected:
                return f"{name} does not match its checksum"
        return None

    def _check_identity(self, path: Path) -> None:
        written = json.loads((path / "trainer.json").read_text())["identity"]
        for name, value in self.identity.items():
            if written.get(name) != value:
                raise UserError(
                    f"resume: {path} was written with {name} {written.get(name)!r}, this run has {value!r}; "
                    f"set {name} back, or resume to never to start anew"
                )


def _rank_state(ema: EMA | None) -> dict[str, Any]:
    return {
        "ema": None if ema is None else ema.shards,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _restore_rank_state(state: dict[str, Any], ema: EMA | None) -> None:
    if ema is not None:
        for name, shard in ema.shards.items():
            shard.copy_(state["ema"][name])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


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
