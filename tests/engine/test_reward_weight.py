"""``reward.weight: auto`` is the DMD loss over the RL loss as RL starts, resumed and on two ranks as on one."""

import json
import re
import time

import pytest
from safetensors.torch import load_file

from dmdr_fast import cli
from dmdr_fast.errors import UserError

COMMON = ["--train.cold_start_steps", "3", "--train.generator_steps", "5", "--checkpoint.every", "1"]
COMMON += ["--optimizer.generator.lr", "2e-3"]
AUTO = [*COMMON, "--reward.weight", "auto"]
FINAL = "final/generator.safetensors"


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def matched(out):
    return re.search(r"step 3: reward\.weight (\S+) \(auto\)", out)[1]


@pytest.fixture(scope="module")
def one_rank(run, tmp_path_factory):
    """(run_dir, weight as it was printed)"""
    folder = tmp_path_factory.mktemp("auto")
    code, out, err = run([*AUTO, "--run_dir", folder])
    assert code == 0, err
    return folder, matched(out)


def test_it_matches_the_losses(run, one_rank, tmp_path):
    """And the run is that of the number."""
    folder, weight = one_rank
    records = log(folder)
    dmd = sum(record["dmd_loss"] for record in records[:3]) / 3
    assert float(weight) == pytest.approx(dmd / abs(records[3]["reward"]), rel=1e-5)
    code, _, err = run([*COMMON, "--reward.weight", weight, "--run_dir", tmp_path])
    assert code == 0, err
    assert (tmp_path / FINAL).read_bytes() == (folder / FINAL).read_bytes()


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_has_the_same_weight(launch, run, one_rank, tmp_path, step):
    """Killed in the cold start, whose losses the checkpoint keeps, or after the match."""
    process = launch([*AUTO, "--run_dir", tmp_path])
    while process.poll() is None and not (tmp_path / f"checkpoints/step_{step:08d}").is_dir():
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (tmp_path / FINAL).exists()
    code, out, err = run([*AUTO, "--run_dir", tmp_path])
    assert code == 0 and "resumed from" in out, err
    assert (tmp_path / FINAL).read_bytes() == (one_rank[0] / FINAL).read_bytes()


def test_two_zero3_ranks_match_as_one(run, one_rank, tmp_path):
    folder, weight = one_rank
    ranks = ["--train.micro_batch_size", "2", "--train.gradient_accumulation", "2", "--deepspeed.stage", "3"]
    code, out, err = run([*AUTO, *ranks, "--run_dir", tmp_path], ranks=2)
    assert code == 0, err
    assert float(matched(out)) == pytest.approx(float(weight), rel=1e-4)
    a, b = load_file(folder / FINAL), load_file(tmp_path / FINAL)
    assert max(((a[n] - b[n]).norm() / a[n].norm().clamp_min(1e-12)).item() for n in a) < 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--rl.method", "dpo"], "that of dpo is no size of the reward, set a number"),
        (["--train.cold_start_steps", "0"], "set train.cold_start_steps above 0, or a number"),
        (["--reward.terms", "[{kind: digits, normalize: running}]"], "normalize running, whose scale moves"),
    ],
)
def test_where_there_is_nothing_to_match_it_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        cli.parse(["--reward.weight", "auto", *change])
