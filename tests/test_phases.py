"""``phases`` and ``fake.renoise``: what may change with the step, and what a configuration of that step is."""

from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmdr_fast import cli, preflight
from dmdr_fast.algorithm.schedules import RenoiseLaw
from dmdr_fast.config.phases import START, Phase
from dmdr_fast.engine.identity import differences, other_run, run_settings
from dmdr_fast.engine.recipe import learning_rates, recipe_of
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.engine.sit_model import SiTModel
from dmdr_fast.errors import UserError

TWO = """[{from: 100, teacher.cfg_scale: 3, train.fake_updates: 1, dyna_rs.alpha0: 2, optimizer.fake.rl_lr: 1e-6},
          {from: 400, teacher.cfg_scale: null, fake.renoise: {kind: uniform, shift: 3}, reward.weight: 0.5}]"""


def parsed(*flags):
    return cli.parse([str(word) for word in flags])[0]


def refusal(*flags):
    with pytest.raises(UserError) as raised:
        parsed(*flags)
    return str(raised.value)


def test_the_recipe_is_a_function_of_the_step():
    config = parsed("--phases", TWO)

    def recipe(step):
        now = config.at(step)
        return recipe_of(now, SiTModel(now, Path()))

    assert recipe(0) == recipe(99) == recipe_of(parsed(), SiTModel(config, Path()))
    first, second = recipe(100), recipe(400)
    assert first == recipe(399) and second == recipe(600)
    assert [r.dmd.cfg_scale for r in (recipe(0), first, second)] == [1.0, 3.0, 1.0]
    assert [r.fake_updates for r in (recipe(0), first, second)] == [3, 1, 1]
    assert [r.renoise.alpha0 for r in (recipe(0), first, second)] == [4.0, 2.0, 2.0]
    assert [r.reward_weight for r in (recipe(0), first, second)] == [0.05, 0.05, 0.5]
    assert first.fake_renoise is None
    assert second.fake_renoise == RenoiseLaw("uniform", dynamic_step=200, shift=3.0)
    assert config.at(400) == config.at(400).at(0) and config.at(399).optimizer.fake.rl_lr == 1e-6


def test_each_switch_says_what_was_and_what_comes():
    config = parsed("--phases", TWO)
    assert config.switches[100] == [
        "teacher.cfg_scale null -> 3", "train.fake_updates 3 -> 1", "dyna_rs.alpha0 4 -> 2",
        "optimizer.fake.rl_lr null -> 1e-06",
    ]  # fmt: skip
    assert config.switches[400][0] == "teacher.cfg_scale 3 -> null" and config.switches[400][2].endswith("0.05 -> 0.5")


TERMS = ["--reward.terms", "[{kind: digits}, {kind: digits_held_out, name: v1.5, weight: 0.5}]"]
BY_NAME = "[{from: 9, reward.terms.v1.5.weight: 2}, {from: 20, reward.terms.digits.weight: 0, reward.weight: 0.2}]"


def test_the_weight_of_a_reward_is_named_by_the_reward():
    config = parsed(*TERMS, "--reward.held_out", "[]", "--phases", BY_NAME)
    assert [[t.weight for t in config.at(k).reward.terms] for k in (8, 9, 20)] == [[1, 0.5], [1, 2], [0, 2]]
    assert [t.weight for t in config.reward.terms] == [1, 0.5]
    assert config.switches == {
        9: ["reward.terms.v1.5.weight 0.5 -> 2"],
        20: ["reward.weight 0.05 -> 0.2", "reward.terms.digits.weight 1 -> 0"],
    }


@pytest.mark.parametrize("flags", [["--phases", TWO], [*TERMS, "--reward.held_out", "[]", "--phases", BY_NAME]])
def test_phases_read_back_as_themselves(tmp_path, flags):
    config = parsed(*flags)
    (tmp_path / "resolved.yaml").write_text(cli.dump(config))
    assert cli.load(tmp_path / "resolved.yaml") == config


def test_every_key_of_a_phase_is_one_of_the_configuration():
    keys, config = dict(cli.leaves()), parsed()
    for path in set(Phase.model_fields) - {START}:
        assert keys[path].annotation == Phase.model_fields[path].annotation
        assert Phase.model_validate({START: 1, path: attrgetter(path)(config)}).overrides == {
            path: attrgetter(path)(config)
        }


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ("[{from: 9, train.fake_updates: 0}]", "phases.0.train.fake_updates: expected int > 0; got 0"),
        ("[{from: 9, reward.weight: 1}, {from: 20, teacher.cfg_scale: x}]", "phases.1.teacher.cfg_scale: expected fl"),
        ("[{from: 9, student.steps: 2}]", "student.steps cannot change in a phase; these can, by their dotted names: "),
        ("[{from: 9, train.gradient_accumulation: 0}]", "phases.0.train.gradient_accumulation: expected int > 0; got"),
        ("[{from: 9, reward.terms.digits.weight: x}]", "phases.0.reward.terms.digits.weight: expected float; got 'x'"),
        ("[{from: 9, reward.terms.digit.weight: 2}]", "digit.weight: no reward has this name; reward.terms has digits"),
        ("[{from: 9, reward.terms.digits.path: x}]", "reward.terms.digits.path cannot change in a phase; these can"),
        ("[{from: 9, reward.terms: []}]", "reward.terms cannot change in a phase; these can"),
        ("[{from: 9, 7: 2}]", "7 cannot change in a phase; these can"),
        ("[{from: 9, teacher: {cfg_scale: 2}}]", "phases: teacher cannot change in a phase; these can"),
        ("[{teacher.cfg_scale: 2}]", "phases.0.from: expected int > 0; got"),
        ("[{from: 0, teacher.cfg_scale: 2}]", "phases.0.from: expected int > 0; got 0"),
        ("[{from: 9}]", "phases.0: it changes nothing; name a key beside from"),
        ("[{from: 9000, teacher.cfg_scale: 2}]", "phases.0.from: 9000 is never reached, train.generator_steps is 700"),
        ("[{from: 9, reward.weight: 1}, {from: 9, reward.weight: 2}]", "phases: from 9, 9; expected rising steps"),
        ("[{from: 9, renoise.t_max: 0}]", "phases.0 (from step 9): renoise.t_min: 0.001 must be below renoise.t_max"),
        ("[{from: 9, fake.renoise: {t_max: 0}}]", "phases.0 (from step 9): fake.renoise.t_min: 0.001 must be below"),
        ("[{from: 9, fake.renoise: {knd: uniform}}]", "phases.0.fake.renoise.knd: unknown key"),
        ("[{from: 9, reward.weight: auto}]", "phases.0.reward.weight: auto is found once, as RL starts"),
        ("[{from: 650, optimizer.generator.lr: 1e-6}]", "after the cold start optimizer.generator.rl_lr (0.0001) hol"),
        ("[{from: 500, rl.tilt.weight: 1}]", "rl.tilt.weight: the tilt ends with the cold start, at step 500; set rew"),
        ("7", "phases: expected [{from, teacher.cfg_scale, "),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(phases, words):
    assert words in refusal("--optimizer.generator.rl_lr", "1e-4", "--phases", phases)


def test_faults_inside_a_law_of_its_own_and_in_other_lists_name_the_key():
    assert refusal("--fake.renoise", "{kind: foo}").startswith("fake.renoise.kind: expected dyna_rs | uniform | ")
    assert refusal("--fake.renoise", "{t_min: 0.9, t_max: 0.5}") == (
        "fake.renoise.t_min: 0.9 must be below fake.renoise.t_max (0.5)"
    )
    assert refusal("--reward.terms", "[{kind: digits, weight: x}]") == "reward.terms.0.weight: expected float; got 'x'"


def test_a_phase_that_needs_guidance_needs_it_there():
    flags = ["--teacher.cfg_scale", "2", "--dmd.decoupled", "true"]
    assert "phases.0 (from step 9): dmd.decoupled: without guidance" in refusal(
        *flags, "--phases", "[{from: 9, teacher.cfg_scale: null}]"
    )


def test_groups_divide_the_batch_of_every_phase(tmp_path):
    flags = ["--run_dir", tmp_path, "--rl.method", "grpo", "--student.steps", "2", "--rl.grpo.group_size", "8"]
    for batch in ("train.micro_batch_size: 3, train.gradient_accumulation: 4", "train.micro_batch_size: 12"):
        config = parsed(*flags, "--phases", f"[{{from: 9, {batch}}}]")
        with pytest.raises(UserError, match=r"rl\.grpo\.group_size: 8 does not divide the global batch of 12"):
            preflight.check(config)
    batch = "train.micro_batch_size: 2, train.gradient_accumulation: 4"
    preflight.check(parsed(*flags, "--phases", f"[{{from: 9, {batch}}}]"))


def test_the_fake_score_s_warm_up_counts_its_own_updates():
    """R = 3 for 2 generator steps, 1 for 3, then 2: rate k / 10 at the role's own step k."""
    config = parsed("--phases", "[{from: 2, train.fake_updates: 1}, {from: 5, train.fake_updates: 2}]")
    settings = config.optimizer.fake.model_copy(update={"lr": 1.0, "rl_lr": None, "warmup_steps": 10})
    assert [config.fake_updates_before(step) for step in range(8)] == [0, 3, 6, 7, 8, 9, 11, 13]
    rates = []
    for step in range(6):
        updates, before = config.at(step).train.fake_updates, config.fake_updates_before(step)
        rates += learning_rates(settings, step, 300, 600, updates, before)
    assert rates == pytest.approx([*(k / 10 for k in range(1, 11)), 1.0])


def noted(*flags):
    alone, files = Runtime(0, 1, torch.device("cpu"), None), SimpleNamespace(weight_files=list)
    return run_settings(parsed(*flags), files, alone)


def test_what_a_checkpoint_notes_of_them():
    """The fake update's law makes another run; phases may change, and are said."""
    plain, own, later = (
        noted(),
        noted("--fake.renoise", "{kind: uniform}"),
        noted("--phases", "[{from: 9, reward.weight: 1}]"),
    )
    assert other_run(plain, own)[0].startswith("fake.renoise None, this run has {") and not other_run(plain, later)
    assert differences(plain, later) == ['phases [] -> [{"from": 9, "reward.weight": 1.0}]']


YOUNGER = ("student.sampler", "student.eta", "student.times", "student.network", "fake.renoise", "phases")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--student.sampler", "ode"], "student.sampler 'renoise', this run has 'ode'"),
        (["--student.times", "[1.0]"], "student.times None, this run has [1.0]"),
        (["--fake.renoise", "{kind: uniform}"], "fake.renoise None, this run has {"),
        (["--phases", "[{from: 9, reward.weight: 1}]"], None),
    ],
)
def test_a_checkpoint_that_is_older_than_a_key_had_its_default(flags, words):
    before = {name: value for name, value in noted().items() if name not in YOUNGER}
    assert not other_run(before, noted()) and not differences(before, noted())
    found = other_run(before, noted(*flags))
    assert (found[0].startswith(words) and len(found) == 1) if words else not found
    assert other_run(before, noted() | {"student.network": "x (sha256 0)"})
    said = differences(before, noted(*flags))
    assert said == (['phases [] -> [{"from": 9, "reward.weight": 1.0}]'] if flags[0] == "--phases" else [])
