"""fp16: the rounding of g by the score pass on a random SiT-S/2, overflow, loss scaling, exact resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dmdr_fast import cli
from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.algorithm.recipe import Recipe
from dmdr_fast.algorithm.score_pass import shared_scores
from dmdr_fast.engine.engines import DTYPES
from dmdr_fast.engine.memory import Probe
from dmdr_fast.engine.score import ScoreRole, score_rounding
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.sit import SIT_CONFIGS, SiT
from tests.tiers import sampled

SCRIPT = Path(__file__).with_name("fp16_on_cpu.py")
SIX = ["--train.cold_start_steps", "3", "--train.generator_steps", "6", "--checkpoint.every", "3"]
FINAL = "final/generator.safetensors"
APART = 0.019  # |v_fake - v_real| / |v_real|


def result(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sit():
    """A random SiT-S/2 that no layer of zeros hides, on 8x8 latents, and a random LoRA for the fake score."""
    torch.manual_seed(0)
    network = SiT(**SIT_CONFIGS["SiT-S/2"], input_size=8, num_classes=10)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "adaLN" in name or name.startswith("final_layer.linear"):
                p.normal_(std=0.5 if name.startswith("final") else 0.02)
    adapter = add_lora(network, "fake", rank=32, targets=["attn.qkv"])
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if name.endswith("lora_B"):
                p.normal_()
    return network.bfloat16(), adapter


@pytest.fixture
def rounding(sit, tmp_path):
    """rounding(score_dtype, own, fake_scale) -> the measured Rounding, for weights that are stored in ``own``."""
    network, adapter = sit
    (tmp_path / "empty.yaml").write_text("")
    rng = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(4, 4, 8, 8, generator=rng) for _ in range(2))
    y = torch.tensor([1, 2, 3, 4])
    probe = Probe(x0, noise, torch.tensor([0.1, 0.3, 0.5, 0.7]), y, torch.full_like(y, 10))
    recipe = Recipe((1.0, 0.0), (4, 8, 8), 1, 1, dmd=DMDOptions(nan_policy="keep"))

    def measured(score_dtype, own="bf16", fake_scale=0.05):
        flags = ["--rl.method", "none", "--teacher.train.data", "digits"]
        flags += ["--deepspeed.dtype", own, "--dmd.score_dtype", score_dtype]
        config, _ = cli.parse(["--config", str(tmp_path / "empty.yaml"), *flags])
        role = ScoreRole(network.to(DTYPES[own]), config)
        score = shared_scores(role, adapter.set_scale, fake_scale=fake_scale)
        return score_rounding(score, [role], lambda x, t, y: x, probe, recipe, 0)

    return measured


def test_fp16_scores_keep_the_dmd_gradient_where_bf16_drowns_it(rounding):
    scale = 0.05 * APART / rounding("fp32").apart
    fp16, bf16 = rounding("fp16", fake_scale=scale), rounding("compute", fake_scale=scale)
    assert fp16.apart == pytest.approx(APART, rel=0.1) and not fp16.stand_in
    assert fp16.error < 0.1
    assert bf16.error > 4 * fp16.error
    assert rounding("fp32", fake_scale=scale).error == 0.0
    assert rounding("fp16", "fp32", scale).error < 0.1


def test_a_planted_overflow_of_the_scores_is_one_counted_named_skip(run, environment, monkeypatch, tmp_path):
    monkeypatch.setitem(environment, "OVERFLOW_STEPS", "4")
    code, out, err = run([*SIX, "--run_dir", tmp_path, "--dmd.score_dtype", "fp16"], script=SCRIPT)
    assert code == 0, err
    said = [line for line in out.splitlines() if "skipped" in line]
    assert said == [
        "step 5: update of generator (the scores overflowed in fp16, set dmd.score_dtype to compute or fp32; "
        "not finite: dmd_loss, rl_grad_ratio) skipped, 1 in a row"
    ]
    assert [(r["skipped"], r["score_overflow"]) for r in result(tmp_path)] == [(0, 0)] * 4 + [(1, 16), (1, 0)]


ENGINES = {
    "stage 0": ["--deepspeed.stage", "0"],
    "stage 2": ["--deepspeed.stage", "2"],
    "stage 3": ["--deepspeed.stage", "3"],
    "shared_all": ["--sharing", "shared_all", "--student.lora.rank", "4"],
}


@pytest.fixture(scope="module")
def in_fp32(run, tmp_path_factory):
    """in_fp32(options) -> the log of the run in fp32; made once."""
    made = {}

    def log(options):
        if tuple(options) not in made:
            folder = tmp_path_factory.mktemp("fp32")
            code, _, err = run([*options, "--run_dir", folder])
            assert code == 0, err
            made[tuple(options)] = result(folder)
        return made[tuple(options)]

    return log


@pytest.mark.parametrize("engine", sampled(["stage 3", "stage 0", "shared_all"]))
def test_fp16_follows_fp32(run, in_fp32, tmp_path, engine):
    """Losses and the norms of the gradients before clipping, which no loss scale is left in."""
    half = ["--deepspeed.dtype", "fp16", *ENGINES[engine]]
    code, out, err = run([*SIX, *half, "--run_dir", tmp_path], script=SCRIPT)
    assert code == 0, err
    assert " skipped, " not in out
    exact = in_fp32([*SIX, *(ENGINES[engine] if engine == "shared_all" else [])])
    for a, b in zip(result(tmp_path), exact, strict=True):
        assert a["fake_loss"] == pytest.approx(b["fake_loss"], rel=2e-3)
        assert a["fake_grad_norm"] == pytest.approx(b["fake_grad_norm"], rel=2e-2)
    assert a["generator_grad_norm"] == pytest.approx(b["generator_grad_norm"], rel=2e-2)


@pytest.mark.parametrize("engine", sampled(ENGINES))
def test_an_overflow_halves_the_loss_scale_is_counted_and_survives_a_resume(run, tmp_path, engine):
    """The scale starts at 2^24, where the fake score's gradients overflow."""
    (tmp_path / "scale.json").write_text(json.dumps({"fp16": {"initial_scale_power": 24}}))
    options = [*SIX, *ENGINES[engine], "--train.fake_updates", "1", "--deepspeed.dtype", "fp16"]
    options += ["--deepspeed.config", tmp_path / "scale.json"]
    code, out, err = run([*options, "--run_dir", tmp_path / "whole"], script=SCRIPT)
    assert code == 0, err
    skips, log = [line for line in out.splitlines() if " skipped, " in line], result(tmp_path / "whole")
    fake = sum("update of fake" in line for line in skips)
    assert "step 1: update of fake (fp16 gradients overflowed; loss scale now fake 8.38861e+06) skipped" in out
    assert fake > 1 and log[-1]["fake_loss_scale"] == 2.0 ** (24 - fake)
    assert log[-1]["skipped"] == len(skips)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    checkpoint = tmp_path / "again" / "checkpoints" / "step_00000003"
    code, _, err = run([*options, "--run_dir", tmp_path / "again", "--resume", checkpoint], script=SCRIPT)
    assert code == 0, err
    assert (tmp_path / "again" / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()
    assert [r["fake_loss_scale"] for r in result(tmp_path / "again")] == [r["fake_loss_scale"] for r in log]


@pytest.mark.thorough
def test_scores_in_fp16_under_zero_3_on_two_ranks_resume_to_the_byte(run, tmp_path):
    options = [*SIX, "--deepspeed.stage", "3", "--deepspeed.dtype", "bf16", "--dmd.score_dtype", "fp16"]
    options += ["--train.micro_batch_size", "4", "--monitors.max_score_rounding", "1e-9"]
    code, out, err = run([*options, "--run_dir", tmp_path / "whole"], ranks=2)
    assert code == 0, err
    assert "scores     in fp16: rounding moves the DMD gradient by" in out
    assert "is beyond monitors.max_score_rounding 1e-09: the DMD gradient is the rounding of the scores" in out
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    checkpoint = tmp_path / "again" / "checkpoints" / "step_00000003"
    code, _, err = run([*options, "--run_dir", tmp_path / "again", "--resume", checkpoint], ranks=2)
    assert code == 0, err
    assert (tmp_path / "again" / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()
    assert [r.get("score_rounding") for r in result(tmp_path / "again")] == [
        r.get("score_rounding") for r in result(tmp_path / "whole")
    ]


def test_fp16_without_fast_products_is_refused(run, tmp_path):
    code, _, err = run([*SIX, "--run_dir", tmp_path, "--deepspeed.dtype", "fp16"])
    assert code == 2
    assert "deepspeed.dtype: fp16 does not train on this cpu; use bf16 or fp32" in err
