"""Runs of train.py on small pipelines of text-to-image families."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from dmdr_fast import cli
from dmdr_fast.engine.pipeline_model import PipelineModel
from tests.families import PROMPTS, saved

SIZE = 16
BRIGHTNESS = f"{Path(__file__).with_name('user_rewards.py')}:Darkness"


def words(family: str, folder: Path, run_dir: Path, **changes: object) -> list[str]:
    """The command line of a small run; ``folder`` keeps the pipelines and the prompts, ``changes`` are keys with __
    for dots."""
    prompts = folder / "prompts.txt"
    if not prompts.is_file():
        prompts.write_text("\n".join(PROMPTS) + "\n")
    (folder / "empty.yaml").touch()
    flags = {
        "model.family": family,
        "model.resolution": SIZE,
        "teacher.pipeline": saved(family, folder),
        "data.prompts": prompts,
        "data.cache": folder / "cache",
        "run_dir": run_dir,
        "student.steps": 2,
        "train.cold_start_steps": 1,
        "train.generator_steps": 3,
        "train.fake_updates": 1,
        "train.micro_batch_size": 4,
        "lora.rank": 2,
        "optimizer.generator.lr": 1e-2,
        "optimizer.fake.lr": 1e-2,
        "reward.terms": json.dumps([{"kind": BRIGHTNESS}]),
        "reward.weight": 0.5,
        "eval.samples": 0,
        "log.every": 1,
        "log.report": "false",
    } | {name.replace("__", "."): value for name, value in changes.items()}
    flags = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["--config", str(folder / "empty.yaml"), *flags]


def config_of(family: str, folder: Path, run_dir: Path, **changes: object):
    return cli.parse(words(family, folder, run_dir, **changes))[0]


def opened(run_dir: Path) -> SimpleNamespace:
    """A run as it is on disk: its config, its model."""
    config = cli.load(run_dir / "config.yaml")
    return SimpleNamespace(config=config, model=PipelineModel.open(config))
