"""A run across the switches of ``phases``: what it says and logs, and that resuming it is exact."""

import json

import pytest

from .test_resume import FINAL, same_log, wait_for_step

PHASES = """[{from: 3, teacher.cfg_scale: 2.0, train.fake_updates: 1, dyna_rs.alpha0: 2.0},
 {from: 6, train.fake_updates: 3, train.micro_batch_size: 12, optimizer.generator.lr: 1e-5, reward.weight: 0.2,
  fake.renoise: {kind: uniform, shift: 2.0}}]"""
TEN = ["--train.cold_start_steps", "4", "--train.generator_steps", "10", "--checkpoint.every", "3", "--phases", PHASES]
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
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["reward_weight"] for line in log[4:]] == [0.05, 0.05, 0.2, 0.2, 0.2, 0.2]
    assert len({line["generator_lr"] for line in log[:6]}) == 1 and {line["generator_lr"] for line in log[6:]} == {1e-5}
    assert [line["renoise_alpha"] > 3.0 for line in log] == [True] * 3 + [False] * 7


@pytest.mark.thorough
@pytest.mark.parametrize("step", [2, 3, 5, 7])
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
