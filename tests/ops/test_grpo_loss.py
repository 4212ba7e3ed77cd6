"""grpo_loss against max(-A r, -A clip(r)) under autograd."""

from __future__ import annotations

import pytest
import torch

from dmdr_fast import ops


def formula(logprob, old, advantage, low, high, adv_clip=5.0):
    ratio = torch.exp(logprob - old)
    advantage = advantage.clamp(-adv_clip, adv_clip)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)).mean(), ratio


def draws(shape=(64,), spread=0.2, dtype=torch.float64):
    old = torch.randn(shape, dtype=dtype)
    return (
        (old + spread * torch.randn(shape, dtype=dtype)).requires_grad_(),
        old,
        4 * torch.randn(shape, dtype=dtype),
    )


@pytest.mark.parametrize("shape", [(64,), (8, 4), ()])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.1), (0.05, 0.3), (0.0, 0.0)])
def test_loss_gradient_and_stats(shape, low, high):
    logprob, old, advantage = draws(shape)
    out = ops.grpo_loss(logprob, old, advantage, clip_low=low, clip_high=high)
    expected, ratio = formula(logprob, old, advantage, low, high)
    torch.testing.assert_close(out.loss, expected)
    ours, theirs = (torch.autograd.grad(2 * loss, logprob)[0] for loss in (out.loss, expected))
    torch.testing.assert_close(ours, theirs)
    outside = ((ratio < 1 - low) | (ratio > 1 + high)).double().mean()
    stats = (ratio.mean(), (ratio - 1).abs().max(), outside, 0.5 * (logprob - old).square().mean())
    for got, want in zip(out.stats, stats, strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, want.detach())


def test_gradcheck():
    logprob, old, advantage = draws((12,), spread=0.2)
    call = lambda lp: ops.grpo_loss(lp, old, advantage, clip_low=0.1, clip_high=0.1).loss  # noqa: E731
    assert torch.autograd.gradcheck(call, logprob)


def test_on_policy_gradient_is_minus_the_advantage():
    # r = 1 exactly: torch.maximum would split a tie in two halves, which add up to the whole.
    _, old, advantage = draws()
    logprob = old.clone().requires_grad_()
    ops.grpo_loss(logprob, old, advantage, clip_low=1e-4, clip_high=1e-4).loss.backward()
    torch.testing.assert_close(logprob.grad, -advantage.clamp(-5, 5) / 64)


def test_float32_keeps_ratios_of_one_in_ten_thousand():
    old = torch.full((4,), -0.5)
    logprob = old + torch.tensor([2e-4, 5e-5, -5e-5, -2e-4])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    out = ops.grpo_loss(logprob, old, advantage, clip_low=1e-4, clip_high=1e-4)
    truth, _ = formula(logprob.double(), old.double(), advantage.double(), 1e-4, 1e-4)
    torch.testing.assert_close(out.loss.double(), truth, rtol=0, atol=1e-7)
    assert out.stats.clip_fraction == 0.5


def test_advantages_may_be_bfloat16():
    logprob, old, advantage = draws(dtype=torch.float32)
    out = ops.grpo_loss(logprob, old, advantage.bfloat16(), clip_low=0.1, clip_high=0.1)
    expected, _ = formula(logprob, old, advantage.bfloat16().float(), 0.1, 0.1)
    assert out.loss.dtype is torch.float32
    torch.testing.assert_close(out.loss, expected)


def test_no_samples():
    logprob = torch.empty(0, requires_grad=True)
    out = ops.grpo_loss(logprob, torch.empty(0), torch.empty(0), clip_low=0.1, clip_high=0.1)
    out.loss.backward()
    assert out.loss == 0 and logprob.grad.shape == (0,)
