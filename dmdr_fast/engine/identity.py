"""What a run is: the settings that its weights depend on, and what differs between two starts of it."""

from __future__ import annotations

import hashlib
import json
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from dmdr_fast import cache
from dmdr_fast.cli import leaves
from dmdr_fast.config import Config
from dmdr_fast.data.prompts import prompt_files
from dmdr_fast.deepspeed_json import read_deepspeed_json
from dmdr_fast.engine.model import Model
from dmdr_fast.engine.runtime import Runtime

# Sections and keys whose change makes another run; the teacher's content is added.
IDENTITY = (
    "seed",
    "sharing",
    "model",
    "student",
    "fake",
    "lora",
    "teacher.guidance",
    "teacher.cfg_scale",
    "teacher.cfg_mode",
    "data.negative_prompt",
    "optimizer.kind",
    "deepspeed.dtype",
)
PLACES = ("run_dir", "resume")  # where, not what
FINISH = (
    "eval",
    "log.report",
    "reward.held_out",
    "teacher.sample_cfg_scale",
)  # what only the evaluation and the report read
# Where the teacher and a generator's own network come from; their content counts.
ORIGINS = (
    *("teacher.weights", "teacher.pipeline", "teacher.revision", "teacher.train"),
    *("student.pipeline", "student.revision"),
)


def run_settings(config: Config, model: Model, ranks: Runtime) -> dict[str, Any]:
    """Everything that a checkpoint notes of its run, by dotted key, as JSON keeps it. All ranks must call.

    Beside the configuration: "teacher", where the teacher comes from and the SHA-256 of its weights; "student.network",
    the same of the generator's own network before training; "ranks", "global batch"; "data.prompts (content)" and
    "optimizer (deepspeed.config)", where there are such files.
    """
    noted = _by_key(config)
    origin = config.teacher.weights or config.teacher.pipeline or "trained on " + str(config.teacher.train.data)
    noted["teacher"] = f"{origin} (sha256 {content_hash(model.weight_files(), ranks)[:16]})"
    noted["student.network"] = config.student.own_network
    if config.student.own_network is not None:
        noted["student.network"] += f" (sha256 {content_hash(model.student.weight_files(), ranks)[:16]})"
    if noted["student.model"] is not None:
        del noted["student.model"]["weights"]
    noted["ranks"] = ranks.world_size
    noted["global batch"] = config.train.batch * ranks.world_size
    if config.model.family != "sit":
        assert config.data.prompts is not None  # every family but SiT has some
        noted["data.prompts (content)"] = f"sha256 {content_hash(prompt_files(config.data.prompts), ranks)[:16]}"
    optimizer = read_deepspeed_json(config).get("optimizer") or {}
    noted["optimizer (deepspeed.config)"] = optimizer.get("type")
    return json.loads(json.dumps(noted))


def _by_key(config: Config) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    return {path: reduce(getitem, path.split("."), values) for path, _ in leaves()}


def _then(before: dict[str, Any]) -> dict[str, Any]:
    """``before`` with the keys that are younger than it: its run was what their defaults are."""
    return _by_key(Config.model_construct()) | {"student.network": None} | before


def content_hash(files: list[Path], ranks: Runtime) -> str:
    """SHA-256 over the contents of files, whatever they are called; each rank reads its share. All ranks must call.

    A file's own hash is kept in the cache under its path, size and time of change: 40 GB are read once.
    """
    share = {i: cache.file_hash(files[i]) for i in range(ranks.rank, len(files), ranks.world_size)}
    hashes = {i: value for part in ranks.gather(share) for i, value in part.items()}
    return hashlib.sha256("".join(hashes[i] for i in sorted(hashes)).encode()).hexdigest()


def other_run(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes ``now`` another run than the one that noted ``before``: "student.steps 1, this run has 2" each."""
    before, found = _then(before), []
    for name in sorted(before.keys() & now.keys()):
        if _content(name, before[name]) != _content(name, now[name]) and _is_identity(name, now):
            found.append(f"{name} {before[name]!r}, this run has {now[name]!r}")
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The other keys that differ: "optimizer.generator.lr 2e-06 -> 1e-06" each."""
    before = _then(before)
    return [
        f"{name} {json.dumps(before[name])} -> {json.dumps(now[name])}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name] and not _below(name, (*PLACES, *ORIGINS)) and not _is_identity(name, now)
    ]


def evaluates_anew(changes: list[str]) -> bool:
    """Whether :func:`differences` change what a finished run's evaluation or report says."""
    return any(_below(change.split(" ", 1)[0], FINISH) for change in changes)


def _is_identity(name: str, now: dict[str, Any]) -> bool:
    unused: tuple[str, ...] = (*ORIGINS, "lora") if now["sharing"] == "separate" else ORIGINS
    unused += ("student.eta",) if now["student.sampler"] != "cps" else ()
    unused += ("student.lora.targets", "student.lora.scale") if not now["student.lora.rank"] else ()
    return name in ("teacher", "optimizer (deepspeed.config)") or (_below(name, IDENTITY) and not _below(name, unused))


def _below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(section + ".") for section in sections)


def _content(name: str, value: Any) -> Any:
    """Of networks the content alone counts: a folder may move."""
    return value.rpartition("(sha256 ")[2] if name in ("teacher", "student.network") and value else value
