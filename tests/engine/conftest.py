"""Runs of the real command on a small digits task, in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "dmdr_fast" / "train.py"
SMALL = [
    *("--config", str(ROOT / "configs" / "digits.yaml")),
    *("--model.hidden_size", "32", "--model.depth", "2", "--model.num_heads", "2"),
    *("--teacher.train.steps", "30", "--train.micro_batch_size", "8", "--train.fake_updates", "2"),
    *("--lora.rank", "4", "--eval.samples", "0", "--log.every", "1"),
]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The environment of the runs: CPU, one thread, a cache that the session shares."""
    cache = tmp_path_factory.mktemp("cache")
    return os.environ | {"DMDR_FAST_CACHE": str(cache), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def launch(environment):
    """launch(arguments, ranks=0) -> a started process; ranks = 0 is plain python, otherwise the deepspeed launcher."""

    def start(arguments, ranks=0, small=True, script=TRAIN, **options):
        words = [*(SMALL if small else []), *map(str, arguments)]
        command = [sys.executable, str(script)]
        if ranks:
            launcher = str(Path(sys.executable).parent / "deepspeed")
            command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(_free_port()), str(script)]
        return subprocess.Popen(
            [*command, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

    return start


@pytest.fixture(scope="session")
def run(launch):
    """run(arguments, ...) -> (exit code, stdout, stderr) of a finished process."""

    def finish(arguments, ranks=0, **options):
        process = launch(arguments, ranks, **options)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return finish


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
