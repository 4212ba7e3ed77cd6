"""The command: `pytest benchmarks` prints its table, writes its files, and fails on a result that got slower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "benchmarks" / "bench_renoise.py"
CASE = "given_noise and float32"  # the quickest to compile and run


def run(*options):
    environment = os.environ | {"DMDR_FAST_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(BENCH), "-k", CASE, "-q", "-p", "no:cacheprovider"]
    command += map(str, options)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.thorough
def test_run_saves_and_comparison_fails_past_five_percent(tmp_path):
    results, picture = tmp_path / "r.json", tmp_path / "r.png"
    first = run("--bench-json", results, "--bench-plot", picture)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "x compile" in first.stdout and "renoise" in first.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")

    record = json.loads(results.read_text())
    assert record["device"]["kind"] in ("cpu", "cuda") and record["versions"]["torch"]
    assert {"commit", "date", "uncommitted_changes"} <= record.keys()
    assert [row["what"] for row in record["rows"]] == ["forward", "forward + backward"]
    assert all(row["backend"] == "reference" for row in record["rows"])

    for row in record["rows"]:
        row["eager_ratio"] = {name: 10 * value for name, value in row["eager_ratio"].items()}
    results.write_text(json.dumps(record))
    lines = tmp_path / "deep" / "lines.jsonl"
    second = run("--bench-compare", results, "--bench-no-compile", "--bench-lines", lines, "--bench-resources")
    assert second.returncode == 1
    assert "FAILED renoise (noise), 8x16x128x128, float32, reference, forward: " in second.stdout
    assert "compiled ahead of time" in second.stdout and "compiled ahead of time" not in first.stdout
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["what"] for row in told] == ["forward", "forward + backward"]
    assert all(set(row["times"]) == {"fused", "eager", "copy"} and row["compile_ratio"] is None for row in told)


def test_missing_file_to_compare_with_is_a_usage_error(tmp_path):
    done = run("--bench-compare", tmp_path / "none.json")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "none.json: not a file of results" in done.stderr
