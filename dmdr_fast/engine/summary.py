"""summary.json: what ran, when, from which command and which version, for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import deepspeed
import torch

import dmdr_fast
from dmdr_fast.commit import commit
from dmdr_fast.config import Config
from dmdr_fast.engine.go_on import given_command
from dmdr_fast.engine.inputs import REAL_SCENES
from dmdr_fast.engine.runtime import Runtime

SUMMARY = Path("summary.json")


def origin() -> dict[str, str | None]:
    """Command, versions and commit of this process, taken at its start: the files may change while it runs."""
    return {
        "command": given_command(),
        "dmdr_fast": dmdr_fast.__version__,
        "commit": commit(Path(dmdr_fast.__file__).parent),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def write_summary(
    config: Config,
    ranks: Runtime,
    origin: Mapping[str, str | None],
    trained: Mapping[str, int],
    *,
    updates: int,
    skipped: int,
    elapsed: float,
) -> None:
    """Write ``run_dir/summary.json`` of a finished run.

    Args:
        trained: trained parameters by role.
        elapsed: seconds of training, those before a resume included.
    """
    train = config.train
    summary: dict[str, Any] = {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "training_seconds": elapsed,
        **origin,
        "updates": updates,
        "skipped": skipped,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU",
        "ranks": ranks.world_size,
        "samples_per_rank": train.micro_batch_size,
        "gradient_accumulation": train.gradient_accumulation,
        "batch": ranks.world_size * train.batch,
        "phase": {f"at step {step}": ", ".join(changes) for step, changes in config.switches.items()},
        "parameters_trained": dict(trained),
        "generator_network": config.student.own_network,
    }
    if config.eval.data == "scenes":
        from dmdr_fast.scenes.data import evaluation_scenes
        from dmdr_fast.scenes.verifier import shares_right

        summary["right on real scenes"] = {
            kind: ", ".join(f"{name.replace('_', ' ')} {share:.2%}" for name, share in shares.items())
            for kind, shares in shares_right(evaluation_scenes(REAL_SCENES, seed=0)).items()
        }
    (config.run_dir / SUMMARY).write_text(json.dumps(summary, indent=1))
