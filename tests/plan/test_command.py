"""The command: what it says, its exit codes, and the change that it proposes."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from dmdr_fast.cli import CONFIGS, load
from dmdr_fast.errors import UserError
from dmdr_fast.plan.__main__ import main
from dmdr_fast.plan.advice import cheapest_change, largest_batch
from dmdr_fast.plan.from_config import default_targets, workload
from dmdr_fast.plan.plan import make_plan
from dmdr_fast.plan.sweep import sweep, sweep_plot, sweep_table
from dmdr_fast.plan.workload import Adapter, Hardware, Zero

from . import measured

GPUS = Hardware(gpus=8, reserve=0.0)


@pytest.fixture(scope="module")
def work():
    small = measured.workload("flux", dtype="bf16", activation="none", zero=Zero(stage=3, reduce_bucket=10**6))
    return replace(small, fake_lora=Adapter(4, default_targets(small.shape)), batch=4)


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
    assert "DOES NOT FIT" in said and "no three of the levers" in said


def test_the_configuration_reaches_the_workload():
    work = workload(load(CONFIGS / "sit_xl_256.yaml"))
    assert (work.batch, work.student_steps, work.fake_updates, work.cfg) == (64, 1, 5, False)
    assert (work.zero.stage, work.dtype, work.activation, work.ema) == (2, "bf16", "none", False)
    assert work.blocks == "compiled" and work.reward.dtype == "bf16"
    assert work.fake_lora == Adapter(32, ("attn.qkv",), "post_projection") and work.student_lora is None
    assert work.reward.models == (("classifier", "fp32"),) and work.reward.graded


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


def test_the_largest_batch_is_the_last_that_fits(work):
    hardware = replace(GPUS, memory=make_plan(replace(work, batch=2), GPUS).peak + 1)
    assert largest_batch(work, hardware, limit=4) == 2


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
