"""The score pass: the fake score and the real score (conditional, unconditional) on the same renoised x_t, no grad.

Where F and T share the frozen base they are one batch [fake | real cond | real uncond] with a LoRA scale per sample,
[s_f | s_r | s_r]: weights are read, and under ZeRO-3 gathered, once. With two networks: two passes, CFG batched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dmdr_fast.algorithm.rollout import Network


class Scores(NamedTuple):
    """Predictions of one score pass, each x_t's shape."""

    fake: Tensor
    real: Tensor
    real_uncond: Tensor | None  # None without CFG


class ScorePass(Protocol):
    """What the generator update asks for: all predictions at (x_t, t).

    ``uncond`` is the null condition, None without CFG; ``real_scale`` is DynaDG's s_r at this step.
    """

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any, uncond: Any | None, *, real_scale: float) -> Scores: ...


def join(*conditions: Any) -> Any:
    """Concatenate conditions (tensors or dictionaries of tensors, batch first) along the batch."""
    return tree_map(lambda *parts: torch.cat(parts), *conditions)


def shared_scores(network: Network, set_lora_scale: Callable[[Tensor], None], *, fake_scale: float) -> ScorePass:
    """F and T on one frozen base: F = base + s_f LoRA, T = base + s_r(step) LoRA (DMDR's DynaDG), one batch.

    ``set_lora_scale`` takes the fp32 [3B] (or [2B]) scale per sample before the forward.
    """

    @torch.no_grad()
    def score(x_t: Tensor, t: Tensor, cond: Any, uncond: Any | None, *, real_scale: float) -> Scores:
        batch, parts = x_t.shape[0], 2 if uncond is None else 3
        scale = torch.full((parts * batch,), real_scale, device=x_t.device)
        scale[:batch] = fake_scale
        set_lora_scale(scale)
        conditions = join(cond, cond) if uncond is None else join(cond, cond, uncond)
        out = network(x_t.repeat(parts, *[1] * (x_t.ndim - 1)), t.repeat(parts), conditions).chunk(parts)
        return Scores(out[0], out[1], out[2] if parts == 3 else None)

    return score


def separate_scores(fake: Network, real: Network) -> ScorePass:
    """F and T as two networks: F once, T once with CFG batched. No DynaDG, which needs a shared base: s_r is 0."""

    @torch.no_grad()
    def score(x_t: Tensor, t: Tensor, cond: Any, uncond: Any | None, *, real_scale: float) -> Scores:
        if real_scale != 0.0:
            raise ValueError(f"separate_scores: real_scale must be 0 (DynaDG needs a shared base), got {real_scale}")
        if uncond is None:
            return Scores(fake(x_t, t, cond), real(x_t, t, cond), None)
        twice = x_t.repeat(2, *[1] * (x_t.ndim - 1))
        real_cond, real_uncond = real(twice, t.repeat(2), join(cond, uncond)).chunk(2)
        return Scores(fake(x_t, t, cond), real_cond, real_uncond)

    return score
