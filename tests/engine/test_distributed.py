"""Two ranks under ZeRO-3 are one rank: the same losses and weights at the same global batch."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tests.tiers import sampled

FIVE = ["--train.cold_start_steps", "2", "--train.generator_steps", "5", "--optimizer.generator.lr", "2e-3"]


def result(folder):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, load_file(folder / "final" / "generator.safetensors")


def weight_difference(a, b):
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp_min(1e-12)).item() for n in a)


@pytest.fixture(scope="session")
def shard_all(tmp_path_factory):
    """A DeepSpeed JSON under which stage 3 shards every parameter, small ones too."""
    path = tmp_path_factory.mktemp("deepspeed") / "shard_all.json"
    path.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return path


DECOUPLED = ["--dmd.decoupled", "true", "--student.sampler", "cps"]


@pytest.mark.parametrize(
    ("sharing", "extra"), sampled([("shared_score", []), ("separate", []), ("shared_score", DECOUPLED)])
)
def test_two_zero3_ranks_equal_one_rank(run, tmp_path, shard_all, sharing, extra):
    one, two = tmp_path / "one", tmp_path / "two"
    common = [*FIVE, "--sharing", sharing, "--student.steps", "2", "--teacher.cfg_scale", "2", *extra]
    zero3 = ["--deepspeed.stage", "3", "--deepspeed.config", shard_all, "--rollout.keep_gathered", "true"]
    code, _, err = run([*common, "--run_dir", one])
    assert code == 0, err
    code, _, err = run([*common, "--run_dir", two, "--train.micro_batch_size", "4", *zero3], ranks=2)
    assert code == 0, err
    (log_one, weights_one), (log_two, weights_two) = result(one), result(two)
    assert len(log_one) == len(log_two) == 5
    for a, b in zip(log_one, log_two, strict=True):
        for name in ("dmd_loss", "fake_loss", "reward", "generator_grad_norm", "fake_grad_norm"):
            assert (name in a) == (name in b)
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    assert weight_difference(weights_one, weights_two) < 1e-4


@pytest.mark.parametrize(
    "engine",
    sampled(
        [
            ["--deepspeed.stage", "2", "--train.micro_batch_size", "4", "--train.gradient_accumulation", "2"],
            ["--deepspeed.stage", "2"],
            ["--train.micro_batch_size", "4", "--train.gradient_accumulation", "2"],
        ]
    ),
    ids=["both", "stage 2", "accumulation"],
)
def test_engine_settings_do_not_change_the_numbers(run, tmp_path, engine):
    weights = []
    for name, extra in (("plain", []), ("other", engine)):
        code, _, err = run([*FIVE, "--run_dir", tmp_path / name, *extra])
        assert code == 0, err
        weights.append(result(tmp_path / name)[1])
    assert weight_difference(*weights) < 1e-4


def test_stop_steps_and_reused_rollouts_are_the_same_on_any_ranks(run, tmp_path):
    """Two micro-steps of 4 on one rank are those of 2 x 2, and are two ranks of 4 where each rank draws its own stop
    step. The last of them resumes to the byte."""
    common = [*FIVE, "--student.steps", "3", "--train.rollout_reuse", "2", "--checkpoint.every", "3"]
    ranked = ["--train.micro_batch_size", "4", "--rollout.stop_step_per", "rank"]
    runs = {
        "one": (0, ["--train.micro_batch_size", "4", "--train.gradient_accumulation", "2"]),
        "two": (2, ["--train.micro_batch_size", "2", "--train.gradient_accumulation", "2", "--deepspeed.stage", "2"]),
        "ranked": (2, ranked),
    }
    for name, (ranks, extra) in runs.items():
        code, out, err = run([*common, *extra, "--run_dir", tmp_path / name], ranks=ranks)
        assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("rollouts"))
    assert line == (
        "rollouts   1 of 2.444 forwards per micro-step, each renoised for 2 fake updates, one stop step per rank and "
        "micro-step, of which all await the longest: 2.444 F-units an update"
    )
    log, weights = result(tmp_path / "one")
    for name in ("two", "ranked"):
        other, moved = result(tmp_path / name)
        for a, b in zip(log, other, strict=True):
            assert b["fake_loss"] == pytest.approx(a["fake_loss"], rel=1e-4), (name, a["step"])
        assert weight_difference(weights, moved) < 1e-4
    shutil.copytree(tmp_path / "ranked", tmp_path / "again")
    checkpoint = tmp_path / "again" / "checkpoints" / "step_00000003"
    code, _, err = run([*common, *ranked, "--run_dir", tmp_path / "again", "--resume", checkpoint], ranks=2)
    assert code == 0, err
    again, whole = (tmp_path / name / "final" / "generator.safetensors" for name in ("again", "ranked"))
    assert again.read_bytes() == whole.read_bytes()


def test_ranks_do_not_stop_apart_under_zero_3(run, tmp_path):
    code, _, err = run([*FIVE, "--run_dir", tmp_path, "--rollout.stop_step_per", "rank", "--deepspeed.stage", "3"])
    assert code == 2 and "rollout.stop_step_per: rank; under deepspeed.stage 3" in err


@pytest.mark.parametrize(("stage", "ranks"), sampled([("2", 2), ("3", 0), ("0", 0)]))
def test_bf16_follows_fp32(run, tmp_path, stage, ranks):
    """bf16 compute over fp32 master weights: losses agree to bf16's precision, and the EMA moves as far as in fp32.

    It moves here by a tenth of bf16's rounding of the weights: an average of the bf16 weights would show that rounding.
    Only the length is compared: at the start F is T, and the DMD gradient is the rounding of their difference.
    (DeepSpeed rounds the weights it is given once, so the move is counted from there.)
    """
    fp32, bf16, start = tmp_path / "fp32", tmp_path / "bf16", tmp_path / "start"
    batch = str(8 // max(ranks, 1))
    options = ["--deepspeed.dtype", "bf16", "--deepspeed.stage", stage, "--train.micro_batch_size", batch]
    for arguments, count in (
        (["--run_dir", fp32], 0),
        (["--run_dir", bf16, *options], ranks),
        (["--run_dir", start, "--optimizer.generator.lr", "1e-30"], 0),
    ):
        code, _, err = run([*FIVE, *arguments], ranks=count)
        assert code == 0, err
    for a, b in zip(result(fp32)[0], result(bf16)[0], strict=True):
        assert b["fake_loss"] == pytest.approx(a["fake_loss"], rel=2e-2)
    first, exact, rounded = (result(folder)[1] for folder in (start, fp32, bf16))
    moved = sum((exact[n] - first[n]).square().sum() for n in exact).sqrt()
    moved_bf16 = sum((rounded[n] - first[n].bfloat16().float()).square().sum() for n in exact).sqrt()
    assert 0.5 * moved < moved_bf16 < 2.0 * moved


@pytest.mark.parametrize("stage", sampled(["3", "0"]))
def test_an_optimizer_in_the_json_gets_each_role_s_own_numbers(run, tmp_path, stage):
    """The teacher of ``separate``, which no optimizer steps, is left out of it."""
    path = tmp_path / "ds.json"
    path.write_text('{"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "torch_adam": true}}}')
    given = [*FIVE, "--sharing", "separate", "--optimizer.fake.weight_decay", "0.1", "--deepspeed.stage", stage]
    weights = []
    for name, extra in (("plain", []), ("other", ["--deepspeed.config", path])):
        code, _, err = run([*given, "--run_dir", tmp_path / name, *extra])
        assert code == 0, err
        weights.append(result(tmp_path / name)[1])
    assert weight_difference(*weights) < 1e-4
