"""The score pass: the fake score and the real score (conditional, unconditional) on renoised x_t, no grad.

Where F and T share the frozen base they are one batch [fake | real cond | real uncond] with a LoRA scale per sample,
[s_f | s_r | s_r]: weights are read, and under ZeRO-3 gathered, once. With two networks: two passes, T's rows batched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dmdr_fast.algorithm.rollout import Network


class Rows(NamedTuple):
    """What a network is run on: x_t [B, ...], t fp32 [B], and its condition, batch first."""

    x_t: Tensor
    t: Tensor
    condition: Any


class Scores(NamedTuple):
    """Predictions at one x_t, each x_t's shape."""

    fake: Tensor
    real: Tensor
    real_uncond: Tensor | None  # None without CFG


class ScorePass(Protocol):
    """What the generator update asks for: F's prediction of ``fake`` and T's of each of ``real``, in their order.

    All have one batch size. ``real_scale`` is DynaDG's s_r at this step.
    """

    def __call__(self, fake: Rows, *real: Rows, real_scale: float) -> tuple[Tensor, ...]: ...


def scores_at(score: ScorePass, x_t: Tensor, t: Tensor, cond: Any, uncond: Any | None, *, real_scale: float) -> Scores:
    """All predictions at one (x_t, t). ``uncond`` is the null condition, None without CFG."""
    conditions = (cond,) if uncond is None else (cond, uncond)
    fake, *real = score(Rows(x_t, t, cond), *(Rows(x_t, t, c) for c in conditions), real_scale=real_scale)
    return Scores(fake, real[0], None if uncond is None else real[1])


def join(*conditions: Any) -> Any:
    """Concatenate conditions (tensors or dictionaries of tensors, batch first) along the batch."""
    return tree_map(lambda *parts: torch.cat(parts), *conditions)


def run(network: Network, *rows: Rows) -> tuple[Tensor, ...]:
    """The prediction of each of ``rows``, of one size, in one batch."""
    if len(rows) == 1:
        return (network(*rows[0]),)
    x_t, t, conditions = zip(*rows, strict=True)
    return network(torch.cat(x_t), torch.cat(t), join(*conditions)).chunk(len(rows))


def shared_scores(network: Network, set_lora_scale: Callable[[Tensor], None], *, fake_scale: float) -> ScorePass:
    """F and T on one frozen base: F = base + s_f LoRA, T = base + s_r(step) LoRA (DMDR's DynaDG), one batch.

    ``set_lora_scale`` takes the fp32 scale per sample of the batch before the forward.
    """

    @torch.no_grad()
    def score(fake: Rows, *real: Rows, real_scale: float) -> tuple[Tensor, ...]:
        batch = fake.x_t.shape[0]
        scale = torch.full(((1 + len(real)) * batch,), real_scale, device=fake.x_t.device)
        scale[:batch] = fake_scale
        set_lora_scale(scale)
        return run(network, fake, *real)

    return score


def separate_scores(fake_network: Network, real_network: Network) -> ScorePass:
    """F and T as two networks: T once, its rows batched, F once. No DynaDG, which needs a shared base: s_r is 0."""

    @torch.no_grad()
    def score(fake: Rows, *real: Rows, real_scale: float) -> tuple[Tensor, ...]:
        if real_scale != 0.0:
            raise ValueError(f"separate_scores: real_scale must be 0 (DynaDG needs a shared base), got {real_scale}")
        scores = run(real_network, *real)
        return (*run(fake_network, fake), *scores)

    return score
