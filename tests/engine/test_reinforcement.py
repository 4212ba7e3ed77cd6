"""Reinforcement learning in real runs: methods and regularisers, ranks, resume, rewards that fail, collapse."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dmdr_fast.config import Monitors
from dmdr_fast.engine.monitors import CollapseMonitor
from tests.tiers import sampled, thorough

from .test_distributed import weight_difference
from .test_resume import wait_for_step

REWARDS = Path(__file__).with_name("user_rewards.py")
FOUR = ["--train.cold_start_steps", "1", "--train.generator_steps", "4", "--train.fake_updates", "1"]
GRPO = ["--rl.method", "grpo", "--rl.grpo.noisy_last_step", "true", "--rl.grpo.sde", "dance", "--rl.grpo.eta", "0.3"]
DPO = ["--rl.method", "dpo", "--rl.dpo.beta", "10"]
METHODS = {
    "grpo": [*GRPO, "--rl.grpo.group_size", "4"],
    "grpo, groups over ranks": [*GRPO, "--rl.grpo.group_size", "8", "--student.steps", "2"],
    "dpo": [*DPO, "--rl.dpo.group_size", "4"],
    "dpo, groups over ranks": [*DPO, "--rl.dpo.group_size", "8", "--student.steps", "2"],
    "hybrid": ["--rl.method", "hybrid", "--rl.grpo.group_size", "8", "--student.steps", "2"],
    "tilt": ["--rl.tilt.method", "refl", "--rl.tilt.weight", "0.5", "--train.cold_start_steps", "3"],
    "nft": ["--rl.method", "nft", "--rl.nft.group_size", "8", "--student.steps", "2"],
}
FINAL = "final/generator.safetensors"


def own(name, **more):
    return json.dumps({"kind": f"{REWARDS}:{name}"} | more)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def error_line(code, err, expected=1):
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == expected and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.fixture(scope="session")
def one_rank(run, tmp_path_factory):
    """The log and weights of each method on one rank, run once."""
    done = {}

    def result(method):
        if method not in done:
            folder = tmp_path_factory.mktemp("one")
            code, _, err = run([*FOUR, *METHODS[method], "--run_dir", folder])
            assert code == 0, err
            done[method] = records(folder), load_file(folder / FINAL)
        return done[method]

    return result


@pytest.mark.parametrize(
    ("method", "stage"),
    sampled(
        [
            ("grpo, groups over ranks", "3"),
            ("dpo", "0"),
            ("grpo", "0"),
            ("dpo, groups over ranks", "3"),
            ("hybrid", "3"),
            ("nft", "3"),
            ("tilt", "3"),
        ],
        2,
    ),
)
def test_two_ranks_equal_one_rank(run, one_rank, tmp_path, method, stage):
    log, weights = one_rank(method)
    options = ["--train.micro_batch_size", "4", "--deepspeed.stage", stage, "--run_dir", tmp_path]
    code, _, err = run([*FOUR, *METHODS[method], *options], ranks=2)
    assert code == 0, err
    names = ("reward", "dmd_loss", "fake_loss", "generator_grad_norm", "kept", "dpo_margin", "clip_fraction")
    for a, b in zip(log, records(tmp_path), strict=True):
        assert {n for n in names if n in a} == {n for n in names if n in b}
        for name in names:
            if name in a and name != "dpo_margin":
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (a["step"], name)
    assert weight_difference(weights, load_file(tmp_path / FINAL)) < 1e-4


def test_ratios_are_one_on_the_first_inner_epoch(one_rank):
    for record in one_rank("grpo, groups over ranks")[0][1:]:
        assert record["ratio_max_deviation"] == 0.0 and record["clip_fraction"] == 0.0
        assert record["kept"] == 1.0 and record["rl_grad_ratio"] > 0.0


RESUMED = {
    "grpo with KL": [*METHODS["grpo"], "--rl.regularizer", "kl", "--rl.kl_weight", "0.1"],
    "dpo": METHODS["dpo"],
    "weighted, decoupled": [
        *("--teacher.cfg_scale", "3", "--dmd.decoupled", "true", "--student.steps", "2", "--student.sampler", "ode"),
        *("--rl.method", "grpo", "--rl.grpo.group_size", "4", "--rl.grpo.mode", "advantage_weighted_dmd"),
    ],
    "hybrid": METHODS["hybrid"],
    "nft": METHODS["nft"],
    "tilt": METHODS["tilt"],
    "refl, normalised": ["--reward.terms", json.dumps([{"kind": "digits", "normalize": "running"}])],
}


@pytest.mark.parametrize("method", sampled(RESUMED, 2))
def test_killed_and_resumed_is_uninterrupted_to_the_byte(run, launch, tmp_path, method):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--train.cold_start_steps", "1", *RESUMED[method], "--checkpoint.every", "1"]
    code, _, err = run([*options, "--train.generator_steps", "24", "--run_dir", whole])
    assert code == 0, err
    process = launch([*options, "--train.generator_steps", "24", "--run_dir", broken])
    wait_for_step(process, broken, 3)
    process.kill()
    process.communicate()
    assert not (broken / FINAL).exists()
    code, out, err = run([*options, "--train.generator_steps", "24", "--run_dir", broken])
    assert code == 0 and "resumed from" in out, err
    assert (whole / FINAL).read_bytes() == (broken / FINAL).read_bytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NaN", ["reward 'darkness'", "expected finite scores"]),
        ("Hangs", ["reward 'Hangs'", "2", "reward.timeout"]),
        thorough("WrongShape", ["reward 'darkness'", "[8, 1]", "[8]"]),
        thorough("WrongDevice", ["reward 'darkness'", "meta", "cpu"]),
        thorough("Raises", ["reward 'darkness'", "the tower fell"]),
    ],
)
def test_a_reward_that_fails_is_one_error_and_nothing_is_lost(run, tmp_path, name, words):
    method = METHODS["grpo"] if name == "Hangs" else []
    options = ["--reward.terms", own(name), "--reward.timeout", "2", "--reward.held_out", "[]"]
    code, _, err = run([*FOUR, *method, *options, "--run_dir", tmp_path])
    line = error_line(code, err)
    for word in [*words, "update 1, samples 0 to 7", "--resume auto"]:
        assert word in line, line
    assert (tmp_path / "checkpoints" / "step_00000002" / "manifest.json").is_file()
    code, out, err = run([*FOUR, *method, "--reward.held_out", "[]", "--run_dir", tmp_path])
    assert code == 0 and "resumed from" in out, err
    assert (tmp_path / FINAL).is_file()


def test_a_reward_that_fails_on_one_rank_ends_both(run, tmp_path):
    options = ["--reward.terms", own("NaN"), "--deepspeed.stage", "3", "--train.micro_batch_size", "4"]
    code, _, err = run([*FOUR, *options, "--run_dir", tmp_path], ranks=2)
    assert code == 1 and err.count("expected finite scores") >= 1 and "Traceback" not in err, err
    assert (tmp_path / "checkpoints" / "step_00000002" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reward.terms", own("Ink")], ["reward.terms: ", "without a gradient", "grpo or dpo"]),
        (["--reward.terms", "{kind: digit}"], ["unknown 'digit'", "did you mean digits"]),
        (["--reward.terms", "[]"], ["reward.terms: missing"]),
        (["--reward.terms", "[{kind: digits, wieght: 2}]"], ["reward.terms.0.wieght: unknown key", "weight"]),
        (["--rl.regularizer", "kl"], ["rl.kl_weight: 0"]),
        (["--rl.method", "grpo"], ["rl.grpo: no step of a 1-step student is stochastic", "noisy_last_step"]),
        ([*GRPO, "--rl.grpo.group_size", "1"], ["rl.grpo.group_size: 1"]),
        ([*GRPO, "--rl.grpo.group_size", "3"], ["rl.grpo.group_size: 3", "8"]),
        (["--rl.method", "hybrid", "--student.steps", "2", "--reward.terms", own("Ink")], ["without a gradient"]),
        (["--rl.method", "hybrid"], ["student.steps: 1", "hybrid"]),
        (
            ["--rl.method", "dpo", "--rl.tilt.method", "refl", "--reward.terms", own("Ink")],
            ["without a gradient", "rl.tilt.method refl", "to none"],
        ),
        (["--rl.tilt.method", "refl", "--train.cold_start_steps", "0"], ["train.cold_start_steps is 0"]),
        (["--rl.method", "hybrid", "--student.steps", "2", "--rl.grpo.group_size", "3"], ["rl.grpo.group_size: 3"]),
        (["--rl.method", "dpo", "--rl.reference", "lora_off"], ["rl.reference", "student.lora.rank"]),
        ([*GRPO, "--rl.grpo.mode", "advantage_weighted_dmd"], ["teacher.cfg_scale", "no guidance"]),
    ],
    ids=lambda v: " ".join(w for w in v[:2] if "/" not in w)[:40] if v and v[0].startswith("--") else "",
)
def test_wrong_settings_are_refused_before_anything_is_loaded(run, tmp_path, arguments, words):
    code, _, err = run([*FOUR, "--run_dir", tmp_path, *arguments])
    line = error_line(code, err, expected=2)
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    "options",
    sampled(
        [
            ["--rl.regularizer", "kl", "--rl.kl_weight", "0.5"],
            [*METHODS["grpo"], "--rl.regularizer", "none"],
            ["--rl.regularizer", "none"],
            [*METHODS["dpo"], "--rl.regularizer", "kl", "--rl.kl_weight", "0.5"],
        ],
        2,
    ),
    ids=["refl kl", "grpo", "refl", "dpo kl"],
)
def test_without_dmd_the_fake_score_rests(run, tmp_path, options):
    code, _, err = run([*FOUR, *options, "--run_dir", tmp_path])
    assert code == 0, err
    first, *rest = records(tmp_path)
    of_dmd = {"dmd_loss", "fake_loss", "fake_grad_norm"}
    assert of_dmd <= set(first) and "reward" not in first
    for record in rest:
        assert "reward" in record and not of_dmd & set(record)
        assert ("kl" in record) == ("kl" in options)


def test_several_rewards_are_logged_each_and_held_out_ones_beside(run, tmp_path):
    terms = f"[{{kind: digits, weight: 2}}, {own('Darkness', weight=0.5, normalize='running')}]"
    options = ["--reward.terms", terms, "--reward.held_out", f"[{{kind: digits_held_out}}, {own('Ink')}]"]
    code, _, err = run([*FOUR, *options, "--run_dir", tmp_path])
    assert code == 0, err
    for record in records(tmp_path)[1:]:
        assert {"reward", "reward_digits", "reward_darkness", "held_out_digits_held_out", "held_out_ink"} <= set(record)
    first = records(tmp_path)[1]  # a running scale that nothing is known of yet takes no part
    assert first["reward"] == pytest.approx(2 * first["reward_digits"], rel=1e-5)


def test_advantages_weigh_the_guidance(run, tmp_path):
    options = [*GRPO, "--rl.grpo.group_size", "4", "--rl.grpo.mode", "advantage_weighted_dmd", "--teacher.cfg_scale"]
    code, _, err = run([*FOUR, *options, "2", "--run_dir", tmp_path])
    assert code == 0, err
    assert all({"reward", "dmd_loss", "kept"} <= set(record) for record in records(tmp_path)[1:])


def test_a_lora_generator_is_saved_merged_and_its_reference_is_its_base(run, tmp_path):
    """DPO against the switched-off adapter on two ZeRO-3 ranks is DPO against it on one."""
    lora = ["--student.lora.rank", "4", *METHODS["dpo"], "--optimizer.generator.lr", "1e-2"]
    results = []
    for name, ranks, batch, stage in (("one", 0, "8", "0"), ("two", 2, "4", "3")):
        options = ["--train.micro_batch_size", batch, "--deepspeed.stage", stage, "--run_dir", tmp_path / name]
        code, _, err = run([*FOUR, *lora, *options], ranks=ranks)
        assert code == 0, err
        results.append(load_file(tmp_path / name / FINAL))
    assert not any("lora" in name for name in results[0])
    start = load_file(tmp_path / "one" / "cold_start/generator.safetensors")
    moved = {n for n in start if (start[n] != results[0][n]).any()}
    assert moved and all(n.endswith("attn.qkv.weight") for n in moved)
    assert weight_difference(*results) < 1e-4


def test_a_resumed_monitor_goes_on_counting():
    monitor = CollapseMonitor(Monitors(min_diversity=0.2, patience=3), {"diversity": 2})
    assert monitor.look({"diversity": float("nan")}) == ([], None)
    assert monitor.look({"diversity": 0.1})[1].startswith("diversity 0.1 is beyond monitors.min_diversity 0.2")


def test_collapse_warns_and_ends_the_run_when_asked(run, tmp_path):
    def beyond(name, step):
        checkpoint = tmp_path / name / "checkpoints" / f"step_{step:08d}"
        assert (checkpoint / "manifest.json").is_file()
        return json.loads((checkpoint / "trainer.json").read_text())["counters"]["beyond"]

    options = ["--monitors.min_diversity", "100", "--monitors.patience", "2"]
    code, out, err = run([*FOUR, *options, "--run_dir", tmp_path / "warned"])
    assert code == 0 and out.count("samples of a class grow alike") >= 2 and "monitors.min_diversity 100" in out, err
    assert beyond("warned", 4) == {"diversity": out.count("samples of a class grow alike")}
    code, _, err = run([*FOUR, *options, "--train.stop_on_collapse", "true", "--run_dir", tmp_path / "ended"])
    line = error_line(code, err)
    assert "collapse: diversity" in line and "2 log intervals in a row" in line
    step = int(re.search(r"checkpoint of step (\d) was written", line)[1])
    assert step < 4 and beyond("ended", step) == {}  # what goes on has the patience anew


@pytest.mark.thorough
@pytest.mark.parametrize(("every", "words"), [(1, "A checkpoint of step 1 was written"), (0, "The weights are in ")])
def test_a_reward_that_fails_in_an_evaluation_is_one_line(run, tmp_path, every, words):
    options = ["--rl.method", "none", "--reward.terms", "[]", "--reward.held_out", f"[{own('Raises')}]"]
    code, _, err = run([*FOUR, *options, "--eval.samples", "16", "--eval.every", every, "--run_dir", tmp_path])
    line = error_line(code, err)
    assert "reward 'darkness', evaluation: the tower fell. " + words in line and "--resume auto" in line


def test_evaluations_along_the_way(run, tmp_path):
    options = ["--eval.samples", "64", "--eval.every", "2", "--eval.teacher_steps", "2", "--log.report", "false"]
    code, _, err = run([*FOUR, *options, "--run_dir", tmp_path])
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    table = json.loads((tmp_path / "metrics.json").read_text())
    assert [row.pop("step") for row in rows] == [2, 4]
    assert rows[-1] == table["dmdr"] and table["dmdr"]["held_out_reward"] is not None
    assert table["dmdr"]["diversity"] > 0.0 and not (tmp_path / "report.html").exists()
