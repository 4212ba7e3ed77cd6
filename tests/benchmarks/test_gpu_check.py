"""``make gpu-check``: what its stages are, how it runs them, and that tests for GPUs run where packages are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check.stages import STAGES, Stage
from dmdr_fast import cli

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path, *stages, total=60):
    results = command.run(stages, tmp_path, True, total)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["result"]) for line in lines] == [
        (stage.name, result) for stage, result in zip(stages, results, strict=True)
    ]
    return results


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    results = run(
        tmp_path,
        Stage("wrong", 1, "", "echo first; echo the reason >&2; exit 3"),
        Stage("without a tool", 1, "", "true", dry_programs=("no-such-program",)),
        Stage("without a package", 1, "", "true", modules=("no_such_package",)),
        Stage("right", 1, "", 'echo "$OUT"'),
    )
    assert results == [
        "failed: exit code 3: the reason",
        "skipped: needs no-such-program",
        "skipped: needs no_such_package",
        "ok",
    ]
    output = (tmp_path / "output.txt").read_text()
    assert "=== wrong\n" in output and "first\nthe reason\n" in output and f"\n{tmp_path}\n" in output


@pytest.mark.parametrize(
    ("last", "result"),
    [("4 passed, 2 skipped in 1s", "ok: 4 passed, 2 skipped in 1s"), ("2 skipped in 1s", "skipped: 2 skipped in 1s")],
)
def test_tests_that_all_skip_are_no_success(tmp_path, last, result):
    assert run(tmp_path, Stage("tests", 1, "", f"echo {last}", tests=True)) == [result]


def test_a_stage_has_its_limit_and_all_have_one(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "DRY_LIMIT", 1)
    monkeypatch.setattr(command, "GRACE", 0.5)
    child = tmp_path / "child"
    told = Stage("told", 1, "", f"(trap '' INT; sleep 3; touch {child}) & trap 'echo so far' INT; sleep 60")
    stubborn = Stage("stubborn", 1, "", "trap '' INT; sleep 60")
    start = time.monotonic()
    results = run(tmp_path, told, stubborn, told, total=4.5)
    assert results == [*["failed: not done after 1 s"] * 2, "skipped: no time is left"]
    assert time.monotonic() - start < 4.5
    assert "so far" in (tmp_path / "output.txt").read_text()
    time.sleep(max(0, start + 3.5 - time.monotonic()))
    assert not child.exists()  # what a stage has started ends with it


def test_without_a_gpu_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_has_gpu", lambda: False)
    assert command.main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("make gpu-check DRY=1\n")
    assert not (tmp_path / "out").exists()


def test_stages_name_files_that_exist_and_options_that_pytest_knows():
    known = (ROOT / "benchmarks" / "conftest.py").read_text()
    for stage in STAGES:
        assert 0 < stage.limit <= command.TOTAL
        for text in (stage.command, stage.dry):
            for word in text.split():
                if word.startswith(("tests/", "benchmarks/", "dmdr_fast/")):
                    assert (ROOT / word).exists(), word
                if word.startswith("--bench-"):
                    assert f'"{word}"' in known, word
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert sum(stage.limit for stage in STAGES[:5]) < command.TOTAL  # what is right comes before what is fast


def test_the_trainer_s_stage_makes_the_updates_that_the_page_says():
    stage = STAGES[-1]
    config, _ = cli.parse(stage.command.rpartition("train.py ")[2].split())
    page = (ROOT / "docs" / "gpu-check.md").read_text()
    assert f"| {stage.name} | {config.train.generator_steps} updates of the digits trainer" in page
    assert config.train.cold_start_steps == 10 and config.has_rl


def test_cheap_stages_in_small(tmp_path):
    cheap = [stage for stage in STAGES if stage.name in ("wheels", "racecheck")]
    assert len(cheap) == 2
    results = run(tmp_path, *cheap)
    assert results[0].startswith(("ok", "skipped: no wheels in gpu-wheels/"))
    assert results[1] == "ok"
    assert "reference silu_mul" in (tmp_path / "output.txt").read_text()


BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"deepspeed", "diffusers", "pydantic", "pydantic_core", "pytest_timeout"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.thorough
def test_tests_for_gpus_run_without_deepspeed_diffusers_and_pydantic():
    plugins = [word for name in ("cacheprovider", "xdist", "timeout") for word in ("-p", f"no:{name}")]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "-m", "gpu", "-q", *plugins, "tests"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "tests/patch/conftest.py" in done.stdout and "tests/engine/test_starts.py:0: needs deepspeed" in done.stdout
    assert "tests/ops/test_sweep.py:" in done.stdout  # collected, and skipped for want of a device alone
