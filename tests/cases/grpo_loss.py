"""Cases of grpo_loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tests.cases import _wrong as wrong
from tests.cases._kinds import Op

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def formula(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, ...]:
    advantage = advantage.clamp(-5, 5)
    ratio = torch.exp(logprob - old_logprob)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)).mean()
    ratio = ratio.detach()
    outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    kl = 0.5 * (logprob.detach() - old_logprob).square().mean()
    return loss, ratio.mean(), (ratio - 1).abs().max(), outside.to(ratio.dtype).mean(), kl


def sweep(d: Choices) -> Case:
    count = d.one_of(7, 1, 600)
    rng = torch.Generator().manual_seed(count)
    tensors = {name: 0.1 * torch.randn(count, generator=rng) for name in ("logprob", "old_logprob")}
    tensors["advantage"] = 3 * torch.randn(count, generator=rng)
    return d.case("grpo_loss", tensors, clip_low=0.05, clip_high=0.1)


def wrong_arguments() -> wrong.Wrong:
    for name in ("old_logprob", "advantage"):
        yield {name: torch.randn(4)}, rf"{name}: expected shape \[3\] like logprob, got \[4\]"
    for name in ("logprob", "old_logprob"):
        yield {name: torch.randn(3).bfloat16()}, f"{name}: expected float32 or float64 .* got torch.bfloat16"
    for name in ("clip_low", "clip_high", "adv_clip"):
        yield from wrong.numbers(name, -0.1)


OPS = {
    "grpo_loss": Op(
        valid=lambda draw: {
            **{name: torch.randn(3) for name in ("logprob", "old_logprob", "advantage")},
            "clip_low": 0.1,
            "clip_high": 0.1,
        },
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="logprob",
        constants="old_logprob advantage",
        outputs=1,  # statistics of ratios have no gradient
    )
}
