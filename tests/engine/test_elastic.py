"""A checkpoint is read by any number of ranks at any ZeRO stage: the run goes on as if it had never stopped."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dmdr_fast.cli import parse
from dmdr_fast.disk import Writes
from dmdr_fast.engine import runtime
from dmdr_fast.engine.conditions import build_conditions
from dmdr_fast.engine.model import open_model
from dmdr_fast.engine.networks import build_roles
from dmdr_fast.engine.shards import EMA
from dmdr_fast.engine.state import StoredRole, load_role, save_role, slots
from tests.tiers import sampled, thorough

from .conftest import SMALL
from .test_distributed import shard_all, weight_difference  # noqa: F401

FINAL = "final/generator.safetensors"
COMMON = ["--train.cold_start_steps", "2", "--optimizer.generator.lr", "2e-3", "--student.steps", "2"]
COMMON += ["--optimizer.generator.decay", "0", "--checkpoint.every", "100"]  # legs do not say how many updates follow
COMMON += ["--teacher.cfg_scale", "2"]  # guidance: a DMD gradient that is no rounding
LOSSES = ("dmd_loss", "fake_loss", "reward", "generator_grad_norm", "fake_grad_norm")


def losses(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("sharing", "legs"),
    [
        (["--sharing", "shared_all", "--student.lora.rank", "4"], [(0, 2), (3, 1)]),
        thorough(["--sharing", "shared_score"], [(3, 2), (2, 1), (3, 2), (0, 1), (2, 2)]),
    ],
    ids=["adapters on one base", "full weights and a LoRA"],
)
def test_goes_on_at_another_stage_on_other_ranks(run, tmp_path, shard_all, sharing, legs):  # noqa: F811
    """Every leg trains one update more than the one before it, at (stage, ranks), from its checkpoint."""
    whole, broken, last = tmp_path / "whole", tmp_path / "broken", len(legs) + 1
    common = [*COMMON, *sharing]
    code, _, err = run([*common, "--run_dir", whole, "--train.generator_steps", last])
    assert code == 0, err
    for step, (stage, ranks) in enumerate(legs, 2):
        engine = ["--deepspeed.stage", stage, "--train.micro_batch_size", 8 // ranks]
        engine += ["--deepspeed.config", shard_all] if stage == 3 else []
        options = [*common, *engine, "--run_dir", broken, "--train.generator_steps", step]
        code, out, err = run(options, ranks=ranks if ranks > 1 else 0)
        assert code == 0, err
        assert step == 2 or (f"step {step - 1}" in out and "since the checkpoint: ranks" in out)
        assert "global batch" not in out
    for a, b in zip(losses(whole), losses(broken), strict=True):
        for name in LOSSES:
            assert (name in a) == (name in b)
            assert name not in a or b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    assert weight_difference(load_file(whole / FINAL), load_file(broken / FINAL)) < 1e-4


@pytest.mark.parametrize(("stage", "dtype"), sampled([("3", "bf16"), ("2", "bf16"), ("0", "bf16"), ("3", "fp32")], 2))
def test_a_role_comes_back_to_the_bit(tmp_path, monkeypatch, environment, stage, dtype):
    """Masters, both moments, the step count, the EMA, and weights that are the masters' rounding."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = parse([*SMALL, "--deepspeed.stage", stage, "--deepspeed.dtype", dtype, "--run_dir", str(tmp_path)])[0]
    model, ranks = open_model(config), runtime.start()
    conditions, _ = build_conditions(config, model, ranks)
    roles = [build_roles(config, model, conditions, ranks, lora_seed=0).generator for _ in range(2)]
    averages = [EMA(role.trained, 0.5) for role in roles]
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(4, *model.latent_shape, generator=draw)
        loss = roles[0](x, torch.full((4,), 0.5), torch.arange(4)).square().mean()
        roles[0].backward(loss, last=True)
        assert roles[0].step()
        averages[0].update()
    save_role(tmp_path / "generator", roles[0], averages[0], ranks, Writes())
    assert not list((tmp_path / "generator").glob("*.pt"))
    stored = StoredRole(tmp_path / "generator", [p.name for p in (tmp_path / "generator").iterdir()])
    load_role(stored, roles[1], averages[1], ranks)
    wanted, got = (list(slots(role)) for role in roles)
    states = [getattr(role.optimizer, "optimizer", role.optimizer).state for role in roles]
    for a, b in zip(wanted, got, strict=True):
        assert torch.equal(a.master, b.master) and a.parts == b.parts
        one, two = states[0][a.master], states[1][b.master]
        assert one.keys() == two.keys() >= {"exp_avg", "exp_avg_sq", "step"}
        assert all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)
    assert averages[0].shards.keys() == averages[1].shards.keys()
    assert all(torch.equal(s, averages[1].shards[n]) for n, s in averages[0].shards.items())
    x = torch.randn(4, *model.latent_shape, generator=draw)
    with torch.no_grad():
        one, two = (role(x, torch.full((4,), 0.3), torch.arange(4)) for role in roles)
    assert torch.equal(one, two)
    assert stored.whole().keys() == roles[0].trained.keys()
