"""ZeRO-3 gathers a module's weights as it runs; the fused attention reads its norms' without running it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.thorough
def test_partitioned_weights_are_gathered(tmp_path):
    worker = Path(__file__).with_name("zero3_worker.py")
    root = str(worker.parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, worker, tmp_path / "store"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
