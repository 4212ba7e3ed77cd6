"""A run across the switches of ``phases``: what it says and logs, and that resuming it is exact."""

import json

import pytest

from .test_distributed import result, weight_difference
from .test_resume import FINAL, same_log, wait_for_step

PHASES = """[{from: 3, teacher.cfg_scale: 2.0, train.fake_updates: 1, dyna_rs.alpha0: 2.0},
 {from: 6, train.fake_updates: 3, train.micro_batch_size: 12, optimizer.generator.lr: 1e-5, reward.weight: 0.2,
  fake.renoise: {kind: uniform, shift: 2.0}, reward.terms.held.weight: 0.5},
 {from: 8, train.micro_batch_size: 4, train.gradient_accumulation: 3}]"""
TEN = ["--train.cold_start_steps", "4", "--train.generator_steps", "10", "--checkpoint.every", "3", "--phases", PHASES]
TEN += ["--reward.terms", "[{kind: digits}, {kind: digits_held_out, name: held, weight: 2}]", "--reward.held_out", "[]"]
TEN += ["--teacher.cfg_scale", "4.5", "--optimizer.generator.rl_lr", "null", "--optimizer.generator.decay", "0"]


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    code, out, err = run([*TEN, "--run_dir", folder])
    assert code == 0, err
    return folder, out


def test_a_switch_is_printed_and_takes_effect_at_its_step(uninterrupted):
    folder, out = uninterrupted
    first = "step 3: teacher.cfg_scale 4.5 -> 2, train.fake_updates 2 -> 1, dyna_rs.alpha0 4 -> 2\n"
    assert f"phase      at {first}" in out and f"\nphase at {first}" in out
    assert "\nphase at step 6: fake.renoise null -> {" in out and "fake       renoised" not in out
    assert "}, train.fake_updates 1 -> 3, train.micro_batch_size 8 -> 12, reward.weight 0.05 -> 0.2, optimizer." in out
    assert ", reward.terms.held.weight 2 -> 0.5\n" in out
    assert "\nphase at step 8: train.micro_batch_size 12 -> 4, train.gradient_accumulation 1 -> 3\n" in out
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["reward_weight"] for line in log[4:]] == [0.05, 0.05, 0.2, 0.2, 0.2, 0.2]
    assert len({line["generator_lr"] for line in log[:6]}) == 1 and {line["generator_lr"] for line in log[6:]} == {1e-5}
    for line in log[4:]:
        weight = 2 if line["step"] < 6 else 0.5
        assert line["reward"] == pytest.approx(line["reward_digits"] + weight * line["reward_held"], rel=1e-5)
    assert [line["renoise_alpha"] > 3.0 for line in log] == [True] * 3 + [False] * 7


@pytest.mark.thorough
@pytest.mark.parametrize("step", [2, 3, 5, 7, 8, 9])
def test_killed_before_at_or_after_a_switch_and_resumed_gives_the_same_bytes(
    launch, run, uninterrupted, tmp_path, step
):
    process = launch([*TEN, "--run_dir", tmp_path])
    wait_for_step(process, tmp_path, step)
    process.kill()
    process.communicate()
    assert not (tmp_path / FINAL).exists()
    code, _, err = run([*TEN, "--run_dir", tmp_path])
    assert code == 0, err
    assert (tmp_path / FINAL).read_bytes() == (uninterrupted[0] / FINAL).read_bytes()
    one, two = same_log(tmp_path, uninterrupted[0])
    assert one == two


@pytest.mark.thorough
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_follow_the_phases_of_one(run, uninterrupted, tmp_path, stage):
    halved = PHASES.replace("batch_size: 12", "batch_size: 6").replace("batch_size: 4", "batch_size: 2")
    engine = ["--deepspeed.stage", stage, "--train.micro_batch_size", "4"]
    code, _, err = run([*TEN, "--phases", halved, *engine, "--run_dir", tmp_path], ranks=2)
    assert code == 0, err
    (log_one, weights_one), (log_two, weights_two) = result(uninterrupted[0]), result(tmp_path)
    for a, b in zip(log_one, log_two, strict=True):
        for name in {"dmd_loss", "fake_loss", "reward", "generator_grad_norm", "fake_grad_norm"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    assert weight_difference(weights_one, weights_two) < 1e-4
