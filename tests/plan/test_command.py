"""The command: what it says, its exit codes, and the change that it proposes."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from dmdr_fast.cli import CONFIGS, load, parse
from dmdr_fast.errors import UserError
from dmdr_fast.plan.__main__ import main
from dmdr_fast.plan.advice import changes, cheapest_change
from dmdr_fast.plan.cost import forward_flops
from dmdr_fast.plan.from_config import workload
from dmdr_fast.plan.plan import make_plan, phase_bytes
from dmdr_fast.plan.sweep import sweep, sweep_plot, sweep_table
from dmdr_fast.plan.workload import Adapter, Hardware, RewardNet, Zero
from dmdr_fast.plan.zero import engines

from . import measured

GPUS = Hardware(gpus=8, reserve=0.0)


@pytest.fixture(scope="module")
def work():
    small = measured.workload("flux", dtype="bf16", activation="none", zero=Zero(stage=3, reduce_bucket=10**6))
    return replace(small, fake_lora=Adapter(4, small.shape.opened().lora_targets), batch=4)


@pytest.mark.thorough
def test_the_answer_for_a_recipe(capsys):
    assert main(["--config", str(CONFIGS / "sit_xl_256.yaml"), "--gpus", "8", "--gpu-memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "SiT at 256 px, sharing shared_score" in said and "fits: " in said
    peak = float(re.search(r"fits: ([\d.]+) of 80 GB", said)[1])
    assert f"{peak} |" in next(line for line in said.splitlines() if "(peak)" in line)
    assert re.search(r"one update +\| +20 \|", said)
    assert "(by convolutions 198, half of it in fp32: assumed, not measured)" in said
    assert main(["--config", str(CONFIGS / "sit_xl_256.yaml"), "--gpu-memory", "2.6"]) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "no three of the changes" in said


def test_the_configuration_reaches_the_workload():
    work = workload(load(CONFIGS / "sit_xl_256.yaml"))
    assert (work.batch, work.student_steps, work.fake_updates, work.cfg) == (64, 1, 5, False)
    assert (work.zero.stage, work.dtype, work.activation, work.ema) == (2, "bf16", "none", False)
    assert work.blocks == "compiled" and work.reward.dtype == "bf16"
    assert work.fake_lora == Adapter(32, ("attn.qkv",), "post_projection") and work.student_lora is None
    dino = RewardNet("classifier", "facebook/dinov2-large-imagenet1k-1-layer", num_classes=1000)
    assert work.reward.models == (dino,) and work.reward.graded and work.reward.scores


def test_inner_epochs_are_planned():
    grpo = ["--config", str(CONFIGS / "digits.yaml"), "--student.steps", "2", "--rl.grpo.inner_epochs", "3"]
    work = workload(parse([*grpo, "--rl.method", "grpo"])[0])
    assert (work.epochs, work.policy_steps, work.plain_steps, work.reward.times) == (3, 3, 0, 1)
    work = workload(parse([*grpo, "--rl.method", "hybrid"])[0])
    assert (work.epochs, work.policy_steps, work.plain_steps, work.reward.times) == (3, 6, 2, 3)
    work = workload(parse([*grpo, "--rl.method", "grpo", "--rl.regularizer", "kl", "--rl.kl_weight", "0.1"])[0])
    assert (work.epochs, work.policy_steps, work.reference_steps) == (1, 3, 3)


def test_the_largest_phase_is_planned(capsys):
    phases = "[{from: 9, train.micro_batch_size: 32, teacher.cfg_scale: 2}, {from: 20, train.fake_updates: 7}]"
    digits = ["--config", str(CONFIGS / "digits.yaml"), "--train.rollout_reuse", "2"]
    work = workload(parse([*digits, "--phases", phases])[0])
    assert (work.batch, work.fake_updates, work.cfg, work.rollout_reuse) == (64, 7, True, 2)
    work = workload(parse([*digits, "--phases", "[{from: 9, train.micro_batch_size: 80, train.rollout_reuse: 1}]"])[0])
    assert (work.batch, work.fake_updates, work.cfg, work.rollout_reuse) == (80, 3, False, 1)
    batches = "[{from: 9, train.micro_batch_size: 32, train.gradient_accumulation: 6}]"  # 64 x 1, then 32 x 6
    work = workload(parse([*digits, "--phases", batches])[0])
    assert (work.batch, work.accumulation) == (64, 3)
    assert main([*digits, "--phases", phases]) == 0
    assert "phases: an update with the largest micro-batch, batch and R and the guidance" in capsys.readouterr().out


def test_mistakes_are_one_line():
    for argv, message in (
        ([], "--config: missing"),
        (["--model", "sd9"], "no shape is known for 'sd9'"),
        (["--model", "sd3.5-medium", "--gpus", "2000"], "expected 1 to 1024, got 2000"),
        (["--model", "sd3.5-medium", "--batch", "1", "2"], "are for --sweep"),
        (["--model", "sd3.5-medium", "--tain.micro", "1"], "needs --config"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            main(argv)


def test_no_gpu_library_and_no_hub_is_asked():
    """The command line is answered before torch is loaded: a mistake costs nothing."""
    code = "import sys, dmdr_fast.plan.__main__ as m; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.thorough
def test_the_cheapest_change_fits_and_keeps_what_is_trained(work):
    plan = make_plan(work, GPUS)
    tight = replace(GPUS, memory=0.8 * plan.peak)
    keys, better = cheapest_change(replace(plan, hardware=tight))
    assert better.peak <= tight.memory and better.seconds >= 0.99 * plan.seconds
    assert better.work.sharing == work.sharing and better.work.frozen == "native"
    assert len(keys) == 1, keys
    hopeless = replace(GPUS, memory=1e4)
    assert cheapest_change(replace(plan, hardware=hopeless)) is None


def test_cuda_graphs_keep_the_memory_of_a_forward_without_grad(work):
    work = replace(work, zero=Zero(stage=2))
    plain, graphs = (make_plan(replace(work, cuda_graphs=on), GPUS).phases for on in (False, True))
    pool = max(plain[phase]["activations"] for phase in ("rollout", "score pass"))
    assert pool > 0
    for phase, kinds in graphs.items():
        replayed = phase in ("rollout", "score pass")
        least = sum(plain[phase].values()) - (plain[phase]["activations"] if replayed else 0)
        assert sum(kinds.values()) == pytest.approx(least + pool)


@pytest.mark.thorough
def test_sweep(work, tmp_path):
    plans = sweep(work, GPUS, activations=("none", "full"), batches=(4,), gpus=(8, 1024))
    assert len(plans) == 12
    by = {(p.work.sharing, p.work.activation, p.hardware.gpus): p.peak for p in plans}
    state = {p.work.sharing: p.phases["rollout"]["optimizer"] for p in plans if p.hardware.gpus == 8}
    assert state["separate"] > state["shared_score"]
    assert by["separate", "none", 8] > by["separate", "full", 8] > by["separate", "full", 1024]
    assert len(sweep_table(plans).splitlines()) == 2 + 12
    sweep_plot(plans, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_kept_weights_are_counted():
    """``rollout.keep_gathered``: all of the generator lies on every GPU while rollouts run."""
    small = measured.SHAPES["flux"]
    argv = ["--config", str(CONFIGS / "flux_dev.yaml"), "--model.resolution", "256", "--rollout.keep_gathered"]
    plans = (workload(parse([*argv, value])[0], small) for value in ("true", "false"))
    kept, not_kept = (replace(work, blocks="eager", reward=None) for work in plans)
    whole = engines(kept)["generator"].size
    assert phase_bytes(kept, GPUS)["rollout"]["gathered weights"] == whole
    assert "rollout.keep_gathered: false" in {change.keys for change in changes(kept)}
    near = replace(not_kept, zero=replace(not_kept.zero, reuse_distance=0))
    assert phase_bytes(near, GPUS)["rollout"]["gathered weights"] < whole


def test_auto_in_a_deepspeed_json_is_what_the_trainer_sets(tmp_path):
    file = tmp_path / "ds.json"
    auto = {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "sub_group_size": "auto"}
    file.write_text(json.dumps({"zero_optimization": auto, "train_batch_size": "auto"}))
    argv = ["--config", str(CONFIGS / "flux_dev.yaml")]
    plain, given = parse(argv)[0], parse([*argv, "--deepspeed.config", str(file)])[0]
    small = measured.SHAPES["flux"]
    assert workload(given, small) == workload(plain, small)
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7e6}}))
    assert workload(given, small).zero.reduce_bucket == 7_000_000


TILT = ["--rl.tilt.method", "refl"]


def test_weights_of_rewards_that_no_update_runs():
    """A run without RL holds them all the same, for the evaluation."""
    argv = ["--config", str(CONFIGS / "flux_dev.yaml"), "--model.resolution", "256", "--rl.method"]
    off, tilted = (workload(parse([*argv, "none", *more])[0], measured.SHAPES["flux"]) for more in ([], TILT))
    assert not off.reward.scores and tilted.reward.scores and tilted.reward.graded
    off = replace(off, blocks="eager", reward=replace(off.reward, models=off.reward.models[-1:]))
    phases = phase_bytes(off, GPUS)
    assert "reward" not in phases and phases["rollout"]["decoder and reward"] > 3.9e9  # PickScore in fp32


def test_the_largest_of_several_sizes_is_planned():
    argv = ["--config", str(CONFIGS / "flux_dev.yaml"), "--model.resolution"]
    small = measured.SHAPES["flux"]

    def planned(text):
        return workload(parse([*argv, text])[0], small)

    assert planned("[[1024, 1024], [768, 1280]]").resolution == 1024
    assert planned("[[512, 512], [768, 1280], [1280, 512]]").resolution == (768, 1280)
    wide, square = (forward_flops(planned(text)).sum() for text in ("[512, 2048]", "1024"))
    assert wide == square  # as many tokens
    with pytest.raises(UserError, match=r"model\.resolution: flux: .* got 770 x 1280; the nearest is 768 x 1280"):
        forward_flops(planned("[770, 1280]"))
