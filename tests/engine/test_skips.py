"""Non-finite gradients: the update is skipped on all ranks alike, counted, and too many in a row end the run."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tiers import sampled

SCRIPT = Path(__file__).with_name("nan_reward.py")
STEPS = ["--train.cold_start_steps", "2", "--train.generator_steps", "6"]


@pytest.fixture
def poisoned(environment, monkeypatch):
    def at(*steps):
        monkeypatch.setitem(environment, "NAN_STEPS", ",".join(map(str, steps)))
        monkeypatch.setitem(environment, "RL_STARTS", "2")

    return at


@pytest.mark.parametrize(
    ("ranks", "engine"),
    sampled(
        [(0, []), (2, ["--deepspeed.stage", "3"]), (2, ["--deepspeed.stage", "0"]), (2, ["--deepspeed.stage", "2"])], 2
    ),
    ids=["1 rank", "stage 3", "stage 0", "stage 2"],
)
def test_one_rank_s_nan_skips_the_update_everywhere(run, poisoned, tmp_path, ranks, engine):
    poisoned(3)
    code, out, err = run([*STEPS, "--run_dir", tmp_path, *engine], ranks=ranks, script=SCRIPT)
    assert code == 0, err
    assert "update of generator (not finite: rl_grad_ratio) skipped, 1 in a row" in out
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in log] == [0, 0, 0, 1, 1, 1]
    weights = load_file(tmp_path / "final" / "generator.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_too_many_in_a_row_end_the_run_with_a_checkpoint_and_a_diagnosis(run, poisoned, tmp_path):
    poisoned(2, 3, 4, 5)
    code, _out, err = run([*STEPS, "--run_dir", tmp_path, "--train.max_skipped", "3"], script=SCRIPT)
    assert code == 1
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    assert "3 updates in a row" in line and "generator (not finite: rl_grad_ratio" in line and "--resume" in line
    assert (tmp_path / "checkpoints" / "step_00000005" / "manifest.json").is_file()
    assert "Traceback" not in err
