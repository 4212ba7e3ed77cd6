"""The EMA at ZeRO stage 0 in bf16 is of the fp32 masters, in both of DeepSpeed's optimizers for it."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from dmdr_fast.disk import Writes
from dmdr_fast.engine import runtime
from dmdr_fast.engine.engines import forget_first_step, keep_masters
from dmdr_fast.engine.shards import EMA
from dmdr_fast.engine.state import StoredRole, load_role, save_role

LR, STEPS, DECAY = 1e-4, 5, 0.5


def role(kind):
    """What a trained role has of a network: two layers in bf16, and the optimizer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)).bfloat16()
    scale = {"static_loss_scale": 1.0} if kind is FP16_Optimizer else {}
    optimizer = kind(torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9), **scale)
    keep_masters(optimizer)
    trained = dict(module.named_parameters())
    return SimpleNamespace(optimizer=optimizer, trained=trained, loss_scale_state={}, module=module)


def step(role):
    """Gradients of 1 everywhere: SGD then moves by LR times a sum that is known, less than bf16 shows."""
    for parameter in role.trained.values():
        parameter.grad = torch.ones_like(parameter)
    role.optimizer.step()


@pytest.mark.parametrize("kind", [FP16_Optimizer, FP16_UnfusedOptimizer])
def test_the_average_follows_the_masters_and_resumes_exactly(tmp_path, kind):
    alone, one = runtime.start(), role(kind)
    first = {name: p.detach().float().clone() for name, p in one.trained.items()}
    ema = EMA(one.trained, DECAY)
    moved, velocity, average = 0.0, 0.0, 0.0
    for k in range(STEPS):
        step(one)
        ema.update()
        velocity = 0.9 * velocity + 1.0
        moved -= LR * velocity
        average = DECAY * average + (1 - DECAY) * moved
        if k == 2:
            save_role(tmp_path / "role", one, ema, alone, Writes())
    for name, whole in ema.full(alone):
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole, first[name] + average, rtol=0, atol=1e-6)
    assert any((p.detach().float() - first[n] - moved).abs().max() > 1e-4 for n, p in one.trained.items())  # bf16's
    two = role(kind)
    again = EMA(two.trained, DECAY)
    load_role(StoredRole(tmp_path / "role", [p.name for p in (tmp_path / "role").iterdir()]), two, again, alone)
    for _ in range(3, STEPS):
        step(two)
        again.update()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ema.full(alone), again.full(alone), strict=True))
    assert all(torch.equal(p, two.trained[n]) for n, p in one.trained.items())


@pytest.mark.parametrize("kind", [FP16_Optimizer, FP16_UnfusedOptimizer])
def test_the_first_step_is_adam_s_first(kind):
    """w <- (1 - lr decay) w - lr g / |g|: DeepSpeed has made a step on zeros before it."""
    module = nn.Linear(8, 4).bfloat16()
    scale = {"static_loss_scale": 1.0} if kind is FP16_Optimizer else {}
    optimizer = kind(torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5, betas=(0.0, 0.999)), **scale)
    first = {name: p.detach().float().clone() for name, p in module.named_parameters()}
    forget_first_step(optimizer)
    keep_masters(optimizer)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.fp32_master, first[name])
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.fp32_master, 0.95 * first[name] - 0.1, rtol=0, atol=1e-6)
