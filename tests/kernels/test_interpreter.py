"""The kernel tests in Triton's interpreter, which runs the kernels on the CPU: in a process of its own.

Triton decides when it is imported whether it interprets, and a process that has compiled cannot change.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import sampled

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("tests", "least"), sampled([("tests/kernels/test_kernels.py", 30), ("tests/ops/test_sweep.py", 10)])
)
def test_kernels_in_the_interpreter(pytestconfig, tests, least):
    pytest.importorskip("triton")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", pytestconfig.option.markexpr]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tests],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > least, f"too few tests ran:\n{run.stdout[-2000:]}"
