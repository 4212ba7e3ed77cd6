"""What a group of samples of one condition says about each of them: advantages, and the best and the worst.

Rewards come as those of the global batch [B], gathered over ranks, groups contiguous: group g is the rows
g * group_size .. (g + 1) * group_size - 1. So the numbers do not depend on how many ranks share the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmdr_fast.algorithm.rl.experience import Experience, scored
from dmdr_fast.algorithm.rl.grouped import Grouped
from dmdr_fast.algorithm.rl.grpo import GRPOOptions
from dmdr_fast.algorithm.rl.method import Metrics
from dmdr_fast.algorithm.simulation import Simulated
from dmdr_fast.algorithm.update import Update


def group_advantages(rewards: Tensor, options: Grouped) -> tuple[Tensor, Tensor]:
    """A = (R - mean of its group) / (std + eps), in rewards' dtype [B], and which samples are trained, bool [B].

    std ``group``: of the sample's group; ``global``: of all B rewards; ``none``: A = R - mean. It divides by n, with
    ``unbiased`` by n - 1 (which needs two). Computed in fp64. In a group whose rewards are all alike A is exactly 0,
    and with ``drop_zero_variance`` its samples are not trained.

    Raises:
        ValueError: rewards are not whole groups of at least two, or ``std`` is none of the three.

    Source: Flow-GRPO (arXiv 2505.05470): group or global, population, eps 1e-4; DanceGRPO (arXiv 2505.07818): group,
    unbiased, eps 1e-8.
    """
    groups = _grouped("group_advantages", rewards, options.group_size).double()
    centred = groups - groups.mean(1, keepdim=True)
    alike = (groups.amax(1) == groups.amin(1)).repeat_interleave(options.group_size)
    correction = int(options.unbiased)
    if options.std not in ("group", "global", "none"):
        raise ValueError(f"group_advantages: std must be 'group', 'global' or 'none', got {options.std!r}")
    if options.std == "group":
        centred = centred / (groups.std(1, correction=correction, keepdim=True) + options.eps)
    elif options.std == "global":
        centred = centred / (groups.std(correction=correction) + options.eps)
    advantages = torch.where(alike, 0.0, centred.flatten())
    return advantages.to(rewards.dtype), ~alike if options.drop_zero_variance else torch.ones_like(alike)


def guidance(method: GRPOOptions, update: Update, samples: Sequence[Simulated]) -> tuple[Sequence[Tensor], Metrics]:
    """The factor fp32 [B] on each micro-batch's guidance, from the rewards of its grouped samples, and metrics."""
    parts = [scored(update, s.batch, s.shard, s.rollout.x0) for s in samples]
    advantages, kept = group_advantages(update.gather([p.rewards for p in parts]), method)
    weights = guidance_weights(advantages, kept, method, update.recipe.rl_weight(update.step))
    return [weights[s.shard.rows] for s in samples], Experience(parts, kept).metrics()


def guidance_weights(advantage: Tensor, kept: Tensor, options: GRPOOptions, weight: float) -> Tensor:
    """``advantage_weighted_dmd``: the factor f_b = max(0, 1 + weight clip(A_b, -adv_clip, adv_clip)), [B].

    f weights the guidance part of the DMD gradient, (w - 1)(cond - uncond), and leaves the rest, cond - fake, which
    keeps the generator on the teacher's distribution: for a sample that beats its group the teacher is guided more,
    for one that lost less, down to none. That is a guidance scale per sample: 1 + (w - 1) f_b in ``standard`` mode,
    w f_b in ``offset`` mode. Without guidance there is nothing to weight. A sample that is not ``kept`` has f = 1.
    """
    clipped = torch.where(kept, advantage, 0.0).clamp(-options.adv_clip, options.adv_clip)
    return (1.0 + weight * clipped).clamp_min(0.0)


def best_and_worst(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of the G groups: row of the best sample and of the worst, int64 [G], and their gap in reward [G].

    Among equals the first. A group whose rewards are all alike gives one sample twice (gap 0): such a pair has no
    gradient under :func:`~dmdr_fast.algorithm.rl.preference.dpo_loss`.

    Raises:
        ValueError: rewards are not whole groups of at least two.
    """
    groups = _grouped("best_and_worst", rewards, group_size)
    best, winner = groups.max(1)
    worst, loser = groups.min(1)
    first = torch.arange(len(groups), device=rewards.device) * group_size
    return first + winner, first + loser, best - worst


def _grouped(name: str, rewards: Tensor, group_size: int) -> Tensor:
    """[B] -> [G, group_size]."""
    if group_size < 2:
        raise ValueError(f"{name}: group_size must be at least 2 (samples are compared), got {group_size}")
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(
            f"{name}: rewards must be [B] with B a multiple of group_size {group_size}, got {list(rewards.shape)}"
        )
    return rewards.view(-1, group_size)
