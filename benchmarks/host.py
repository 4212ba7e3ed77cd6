"""The host's share of a call on a GPU, on a machine without one: tests/kernels/host has a driver that runs nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import Row

_ROOT = Path(__file__).resolve().parents[1]
_KEYS = {"forward": "forward", "forward + backward": "both"}


def added(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ``host``; as they are where it cannot be measured (no triton, no gcc)."""
    times = _measured(sorted({_op(row) for row in rows}))
    return [replace(row, host=times.get(_op(row), {}).get(_KEYS.get(row.what, ""))) for row in rows]


def _op(row: Row) -> str:
    """Its public name, without the variant in brackets."""
    return row.op.split(" ")[0]


def _measured(names: list[str]) -> dict[str, dict[str, float]]:
    if find_spec("triton") is None or shutil.which("gcc") is None:
        return {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DMDR_FAST_")}
    command = [sys.executable, "-m", "tests.kernels.host.measure", *names]
    done = subprocess.run(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["ops"]
