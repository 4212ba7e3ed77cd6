"""Runs of the real command on a small digits task, in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .processes import ForkedRun, fresh_run

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "dmdr_fast" / "train.py"
SMALL = [
    *("--config", str(ROOT / "configs" / "digits.yaml")),
    *("--model.hidden_size", "32", "--model.depth", "2", "--model.num_heads", "2"),
    *("--teacher.train.steps", "30", "--train.micro_batch_size", "8", "--train.fake_updates", "2"),
    *("--lora.rank", "4", "--eval.samples", "0", "--log.every", "1", "--log.report", "false"),
]


@pytest.fixture(scope="session")
def environment():
    """The environment of the runs: CPU, one thread."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # of the server that runs are forked from
    # Tests that join a run in this process leave its place in the environment.
    place = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    inherited = {name: value for name, value in os.environ.items() if name not in place}
    return inherited | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def launch(environment):
    """launch(arguments, ranks=0) -> a started run; ranks = 0 is one process that knows of no others.

    ``fresh`` starts a new interpreter, under the deepspeed launcher where there are ranks; ``place`` tells ranks their
    place by other variables than torchrun's.
    """

    def start(arguments, ranks=0, small=True, script=TRAIN, fresh=False, **place):
        words = [*(SMALL if small else []), *map(str, arguments)]
        return (fresh_run if fresh else ForkedRun)(script, words, dict(environment), ranks, **place)

    return start


@pytest.fixture(scope="session")
def run(launch):
    """run(arguments, ...) -> (exit code, stdout, stderr) of a finished run."""

    def finish(arguments, ranks=0, **options):
        process = launch(arguments, ranks, **options)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return finish
