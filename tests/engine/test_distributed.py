"""Two ranks under ZeRO-3 are one rank: the same losses and weights at the same global batch."""

import json

import pytest
from safetensors.torch import load_file

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


@pytest.mark.parametrize("sharing", ["shared_score", "separate"])
def test_two_zero3_ranks_equal_one_rank(run, tmp_path, shard_all, sharing):
    one, two = tmp_path / "one", tmp_path / "two"
    common = [*FIVE, "--sharing", sharing, "--student.steps", "2", "--teacher.cfg_scale", "2"]
    zero3 = ["--deepspeed.stage", "3", "--deepspeed.config", shard_all]
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
    [
        ["--deepspeed.stage", "2"],
        ["--train.micro_batch_size", "4", "--train.gradient_accumulation", "2"],
    ],
    ids=["stage 2", "accumulation"],
)
def test_engine_settings_do_not_change_the_numbers(run, tmp_path, engine):
    weights = []
    for name, extra in (("plain", []), ("other", engine)):
        code, _, err = run([*FIVE, "--run_dir", tmp_path / name, *extra])
        assert code == 0, err
        weights.append(result(tmp_path / name)[1])
    assert weight_difference(*weights) < 1e-4


@pytest.mark.parametrize("stage", ["0", "3"])
def test_bf16_follows_fp32(run, tmp_path, stage):
    """bf16 compute over fp32 master weights: the logged losses agree to bf16's precision."""
    logs = []
    for dtype in ("fp32", "bf16"):
        code, _, err = run(
            [*FIVE, "--run_dir", tmp_path / dtype, "--deepspeed.dtype", dtype, "--deepspeed.stage", stage]
        )
        assert code == 0, err
        logs.append(result(tmp_path / dtype)[0])
    for a, b in zip(*logs, strict=True):
        assert b["fake_loss"] == pytest.approx(a["fake_loss"], rel=2e-2)
