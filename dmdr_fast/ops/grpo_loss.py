"""The clipped policy-gradient loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.reference import compute_dtype


class RatioStats(NamedTuple):
    """Statistics of the probability ratio r, 0-d float32 on the device, no gradient.

    Attributes:
        mean: mean r.
        max_deviation: max |r - 1|.
        clip_fraction: fraction of r outside [1 - clip_low, 1 + clip_high].
        approx_kl: mean (logprob - old_logprob)^2 / 2.
    """

    mean: Tensor
    max_deviation: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


class GRPOLoss(NamedTuple):
    """What ``grpo_loss`` returns: the 0-d loss and the ``RatioStats``."""

    loss: Tensor
    stats: RatioStats


def grpo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    adv_clip: float = 5.0,
) -> GRPOLoss:
    """mean max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = exp(logprob - old_logprob).

    A is the advantage clamped to [-adv_clip, adv_clip].

    Args:
        logprob: any shape, float32 (or float64): under the policy that is trained. bfloat16 would round
            ratios of 1 +- 1e-4 away and is refused.
        old_logprob: its shape and kind: under the policy that sampled; a constant.
        advantage: its shape, any float dtype; a constant.
        clip_low, clip_high: at least 0; usual 1e-4 (1e-5 for cps).
        adv_clip: above 0.

    Returns:
        ``GRPOLoss`` (loss, stats). 0 for no samples. It is plain PyTorch, since a
        vector [B] is no work for a kernel.

    Differentiable in logprob.

    Raises:
        TypeError, ValueError: an argument is not as described; old_logprob or advantage requires grad.

    Source: PPO's clipped objective (arXiv 1707.06347) as in Flow-GRPO (arXiv 2505.05470).
    """
    op = "grpo_loss"
    check.floating(op, "logprob", logprob, min_dim=0)
    for name, value in (("old_logprob", old_logprob), ("advantage", advantage)):
        check.like(op, name, value, logprob, "logprob")
        check.constant(op, name, value)
    for name, value in (("logprob", logprob), ("old_logprob", old_logprob)):
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name}: expected float32 or float64 (rounding decides ratios), got {value.dtype}")
    check.number(op, "clip_low", clip_low, minimum=0)
    check.number(op, "clip_high", clip_high, minimum=0)
    check.number(op, "adv_clip", adv_clip, above=0)
    compute = compute_dtype(logprob, old_logprob, advantage)
    change = logprob.to(compute) - old_logprob.to(compute)
    ratio, advantage = change.exp(), advantage.to(compute).clamp(-adv_clip, adv_clip)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    count = max(ratio.numel(), 1)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped).sum() / count
    change, ratio, clipped = change.detach(), ratio.detach(), clipped.detach()
    stats = RatioStats(
        ratio.sum() / count,
        (ratio - 1).abs().max() if ratio.numel() else ratio.new_zeros(()),
        (ratio != clipped).sum().to(compute) / count,
        change.square().sum() / (2 * count),
    )
    return GRPOLoss(loss, stats)
