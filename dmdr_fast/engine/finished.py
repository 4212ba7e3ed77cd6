"""What a run_dir has of an earlier start: whether anything is left to do, and what a start anew would write over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmdr_fast.config import Config
from dmdr_fast.engine.identity import differences, evaluates_anew, other_run
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.engine.summary import SUMMARY
from dmdr_fast.errors import UserError

FINAL = Path("final") / "generator.safetensors"
COLD_START = Path("cold_start") / "generator.safetensors"
SETTINGS = FINAL.with_name("settings.json")  # what the final weights were made with


def is_finished(
    config: Config, settings: dict[str, Any], checkpoint: Path | None, changes: list[str], ranks: Runtime
) -> bool:
    """Whether the run has made all of its updates and written all that it leaves. All ranks must call.

    Args:
        settings: what the run is made of now.
        checkpoint: the one that the run would go on from; None where it starts anew.
        changes: the settings that differ since then.

    Raises:
        UserError: there is no checkpoint, but weights that a start anew would write over: another run's, or of a run
            that is to go on.
    """
    if checkpoint is not None:
        return not evaluates_anew(changes) and ranks.gather(_has_ended(config, checkpoint))[0]
    if config.resume == "never":
        return False
    finished, fault = ranks.gather(_without_checkpoints(config, settings))[0]
    if fault is not None:
        raise UserError(
            f"resume: {fault}; name another run_dir, or start anew here, over what there is, with --resume never"
        )
    return finished


def _has_ended(config: Config, checkpoint: Path) -> bool:
    step, updates = int(checkpoint.name.rpartition("_")[2]), _read(config.run_dir / SUMMARY).get("updates")
    return step >= config.train.generator_steps and updates == step and _whole(config)


def _without_checkpoints(config: Config, settings: dict[str, Any]) -> tuple[bool, str | None]:
    # Without a cold start its weights are written before the first checkpoint: then they are no sign of one.
    kept = (FINAL, COLD_START) if config.train.cold_start_steps else (FINAL,)
    found = [str(name) for name in kept if (config.run_dir / name).is_file()]
    if not found:
        return False, None
    there, noted = f"{config.run_dir} has {' and '.join(found)}, but no checkpoint", _read(config.run_dir / SETTINGS)
    if noted and (other := other_run(noted, settings)):
        return False, f"{there}, and was written with {'; '.join(other)}"
    updates = _read(config.run_dir / SUMMARY).get("updates")
    ended = noted.get("train.generator_steps") == updates == config.train.generator_steps and _whole(config)
    if ended and not evaluates_anew(differences(noted, settings)):
        return True, None
    return False, f"{there} to go on from"


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _whole(config: Config) -> bool:
    left = [FINAL, Path("report.html")] if config.log.report else [FINAL]
    return all((config.run_dir / name).is_file() for name in left)
