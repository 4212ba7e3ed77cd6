"""Configuration to recipe: the shipped files, the learning rate, the round trip."""

from pathlib import Path

import pytest

from dmdr_fast import cli
from dmdr_fast.algorithm.dmd import Augmentation
from dmdr_fast.config import AdamW
from dmdr_fast.engine.recipe import learning_rates, recipe_of, table_text
from dmdr_fast.engine.sit_model import SiTModel
from dmdr_fast.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_resolved_configuration_reads_back_as_itself(file, tmp_path):
    config = cli.load(file)
    (tmp_path / "resolved.yaml").write_text(cli.dump(config))
    assert cli.load(tmp_path / "resolved.yaml") == config


def test_the_paper_s_imagenet_numbers():
    config = cli.load(CONFIGS / "sit_xl_256.yaml")
    recipe = recipe_of(config, SiTModel(config, Path()))
    assert recipe.grid == (1.0, 0.0) and recipe.latent_shape == (4, 32, 32) and recipe.fake_updates == 5
    assert recipe.real_scale(0) == 0.75 and recipe.real_scale(10000) == 0.0 and config.dyna_dg.fake_scale == 2.0
    assert recipe.renoise.beta(0) == (4.0, 1.5) and recipe.renoise.beta(10000) == (1.0, 1.0)
    assert not recipe.dmd.uses_cfg and recipe.dmd.eps == 1e-8 and recipe.dmd.normalizer == "per_sample"
    assert not recipe.rl_active(19_999) and recipe.rl_active(20_000) and recipe.reward_weight == 0.05
    assert (config.lora.rank, config.lora.form) == (32, "post_projection")
    assert (recipe.renoise.t_min, recipe.renoise.t_max) == (0.0, 1.0)
    assert (config.optimizer.generator.weight_decay, config.optimizer.fake.weight_decay) == (0.01, 0.0)
    assert (config.student.ema, config.optimizer.clip, config.seed) == (None, 1.0, 30)


def test_a_scale_that_leaves_the_fake_score_untrained_is_refused():
    with pytest.raises(UserError, match=r"dyna_dg\.fake_scale: expected float > 0; got 0"):
        cli.parse(["--dyna_dg.fake_scale", "0"])


def test_the_imagenet_recipe_says_where_it_leaves_the_reference():
    """What its header calls different is what its keys are."""
    config, text = cli.load(CONFIGS / "sit_xl_256.yaml"), (CONFIGS / "sit_xl_256.yaml").read_text()
    said = " ".join(line.removeprefix("# ") for line in text.split("run_dir")[0].splitlines())
    said = said.partition("What it does otherwise: ")[2]
    for words, here in (
        ("fp16 with loss scaling, here bf16", config.deepspeed.dtype == "bf16"),
        ("such an update is skipped (dmd.nan_policy)", config.dmd.nan_policy == "keep"),
        ("student.rollout: same_step is the reference's", config.student.rollout == "backward_simulation"),
        ("here the one on the last layer", config.reward.terms[0].path.endswith("imagenet1k-1-layer")),
        ("24 samples per GPU, here 64", config.train.micro_batch_size == 64),
    ):
        assert words in said and here, words


def test_separate_networks_have_no_dynamic_guidance():
    config, _ = cli.parse(["--config", str(CONFIGS / "digits.yaml"), "--sharing", "separate"])
    assert recipe_of(config, SiTModel(config, Path())).real_scale(0) == 0.0


def test_decoupled_dmd_and_the_regulariser_dm():
    words = ["--config", str(CONFIGS / "digits.yaml"), "--student.sampler", "cps", "--student.eta", "0.3"]
    guided = [*words, "--teacher.cfg_scale", "3", "--rl.regularizer", "dm"]
    config, _ = cli.parse([*guided, "--dmd.decoupled", "true", "--dmd.ca.shift", "2", "--dmd.ca.normalizer", "none"])
    recipe = recipe_of(config, SiTModel(config, Path()))
    assert recipe.dmd.ca == Augmentation(t_min=0.001, shift=2.0, normalizer="none") and recipe.dmd.cfg_scale == 3.0
    assert recipe.regularizer == "dm" and recipe.eta == 0.3
    config, _ = cli.parse(guided)
    assert recipe_of(config, SiTModel(config, Path())).dmd.ca is None
    last = [*guided, "--dmd.decoupled", "true", "--student.steps", "4", "--student.shift", "3", "--dmd.ca.shift", "2"]
    cli.parse([*last, "--dmd.ca.t_min", "0.33"])  # t = 0.5 of the grid is 1 / 3 before a shift of 2
    with pytest.raises(UserError, match=r"dmd\.ca\.t_min: 0\.34 is not below the student's last time, 0\.3333 before"):
        cli.parse([*last, "--dmd.ca.t_min", "0.34"])
    for scale in ([], ["--teacher.cfg_scale", "1"]):
        with pytest.raises(UserError, match=r"dmd\.decoupled: without guidance there is one part alone; set teacher"):
            cli.parse([*words, *scale, "--dmd.decoupled", "true"])
        with pytest.raises(UserError, match=r"rl\.regularizer: dm is dmd without guidance, and there is none"):
            cli.parse([*words, *scale, "--rl.regularizer", "dm"])


def test_the_advantage_on_the_guidance_takes_one_step_on_its_samples():
    words = ["--config", str(CONFIGS / "digits.yaml"), "--teacher.cfg_scale", "3", "--rl.method", "grpo"]
    words += ["--rl.grpo.mode", "advantage_weighted_dmd", "--rl.grpo.inner_epochs"]
    cli.parse([*words, "1"])
    with pytest.raises(UserError, match=r"rl\.grpo\.inner_epochs: 2; rl\.grpo\.mode advantage_weighted_dmd takes one"):
        cli.parse([*words, "2"])


def test_flags_override_the_file_and_accept_yaml_values():
    flags = {"optimizer.fake.betas": "[0.5, 0.9]", "student.ema": "null", "optimizer.generator.lr": "1e-5"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    config, shown = cli.parse(["--config", str(CONFIGS / "digits.yaml"), *words, "--print-config"])
    assert config.optimizer.fake.betas == (0.5, 0.9) and config.student.ema is None and shown
    assert config.optimizer.generator.lr == 1e-5


def test_help_documents_every_key():
    text = cli.build_parser().format_help()
    for path, field in cli.leaves():
        assert f"--{path} " in text and field.description


def test_learning_rate_is_constant_then_falls_to_a_tenth_in_each_phase():
    settings = AdamW(lr=1.0, rl_lr=0.5, decay=0.5)
    rates = [rate for step in (0, 50, 75, 99, 100, 150, 175, 199) for rate in learning_rates(settings, step, 100, 200)]
    assert rates == pytest.approx([1.0, 1.0, 0.55, 0.118, 0.5, 0.5, 0.275, 0.059])
    assert learning_rates(AdamW(lr=1.0), 99, 100, 200) == learning_rates(AdamW(lr=1.0), 199, 100, 200) == [1.0]


def test_the_warm_up_counts_each_role_s_own_updates_and_then_ends():
    settings = AdamW(lr=1.0, rl_lr=0.5, warmup_steps=5)
    assert [learning_rates(settings, step, 6, 9)[0] for step in range(8)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.5, 0.5]
    )
    assert [learning_rates(settings, step, 6, 9, updates=2) for step in range(4)] == [
        pytest.approx(pair) for pair in ([0.2, 0.4], [0.6, 0.8], [1.0, 1.0], [1.0, 1.0])
    ]


def test_the_console_s_table_keeps_values_under_their_headings():
    """A text-to-image run's rows: no accuracy, a reward that one row lacks, a heading longer than its numbers."""
    rows = {
        "teacher": {"fd": None, "reward": 0.25, "held_out_reward": 0.5, "accuracy": None, "nfe": 100.0},
        "dmdr": {"fd": None, "reward": None, "held_out_reward": 12.3456, "accuracy": None, "nfe": 4.0},
    }
    assert table_text(rows).split("\n") == [
        "         reward  held_out_reward  nfe",
        "teacher    0.25              0.5  100",
        "dmdr          -            12.35    4",
    ]
    assert table_text({}) == ""
