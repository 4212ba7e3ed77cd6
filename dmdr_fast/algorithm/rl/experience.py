"""What a group-based method learns from: samples of the generator, their rewards, their advantages.

Groups of K samples share a condition and lie side by side in the global batch. Whether a group is whole on one rank or
spread over several does not matter: statistics are taken of the gathered rewards, the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmdr_fast.algorithm.recipe import Batch
from dmdr_fast.algorithm.rl.method import Loss, Metrics
from dmdr_fast.algorithm.rollout import sample
from dmdr_fast.algorithm.streams import Shard
from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class Scored:
    """One micro-batch of samples with their rewards: total fp32 [B] and each by name."""

    batch: Batch
    shard: Shard
    x0: Tensor
    rewards: Tensor
    named: dict[str, Tensor]

    def means(self) -> Metrics:
        """The mean of each reward."""
        return {name: values.mean() for name, values in ({"reward": self.rewards} | self.named).items()}


@dataclass(frozen=True)
class Experience:
    """This rank's samples of one update, one entry per micro-batch, and whose group says something [global batch].

    A method that learns from them has a subclass.
    """

    scored: list[Scored]
    kept: Tensor

    def losses(self, update: Update) -> list[Loss]:
        """The weighted losses of one generator step, each one graded forward."""
        return []

    def metrics(self) -> Metrics:
        """Mean rewards over the micro-batches, and the share of samples whose group says something."""
        parts = [s.means() for s in self.scored]
        metrics = {n: torch.stack([p[n] for p in parts]).mean() for n in parts[0]}
        return metrics | {"kept": self.kept.float().mean()}


@torch.no_grad()
def scored(update: Update, batch: Batch, shard: Shard, x0: Tensor) -> Scored:
    """Decode and score x0 [B, ...], ``reward.chunk`` samples at a time, without grad."""
    reward = update.reward
    assert reward is not None  # RL has one
    totals, named = [], []
    for start in range(0, x0.shape[0], reward.chunk):
        rows = slice(start, min(start + reward.chunk, x0.shape[0]))
        inputs = rows_of(batch.reward_inputs, rows)
        total, each = reward.score(reward.decode(x0[rows]), inputs, update.name_of(shard))
        totals.append(total)
        named.append(each)
    by_name = {n: torch.cat([each[n] for each in named]) for n in named[0]}
    return Scored(batch, shard, x0, torch.cat(totals), by_name)


def rows_of(inputs: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The reward inputs of some rows."""
    return {k: v[rows] for k, v in inputs.items()}


def rl_index(update: Update) -> tuple[int, int]:
    """The draw of conditions of the methods' own samples: the one after the fake updates'."""
    return (update.step, update.recipe.fake_updates)


def sampled_groups(update: Update, group_size: int) -> list[Scored]:
    """Groups of the student's own samples by the generator as it is, with their rewards, for each micro-batch."""
    recipe, streams, index, parts = update.recipe, update.streams, rl_index(update), []
    shape = recipe.shapes[recipe.sizes(streams, index, 1)[0]]  # one for all: they are compared, and may be gathered
    for shard in update.shards:
        batch = update.data(index, shard, group_size)

        def noise(i: int, shard: Shard = shard) -> Tensor:
            return streams.noise("rl_rollout", update.step, i, shape=shape, shard=shard, device=update.device)

        x0 = sample(
            update.networks.generator,
            noise,
            batch.condition,
            recipe.grid,
            eta=recipe.eta,
            kind=recipe.prediction,
            path=recipe.path,
        )
        parts.append(scored(update, batch, shard, x0))
    return parts


def denoising_times(update: Update, purpose: str, shard: Shard, law: Literal["grid", "renoise"]) -> Tensor:
    """Times fp32 [shard.size] of samples that are denoised: points of the student's grid, or of the renoise law."""
    recipe, streams, draw = update.recipe, update.streams, update.counters
    if law == "renoise":
        return streams.times(recipe.renoise, purpose, *draw, step=update.step, shard=shard, device=update.device)
    points = streams.rng(purpose, *draw).integers(len(recipe.grid) - 1, size=shard.total)
    return torch.tensor([recipe.grid[i] for i in points[shard.rows]], device=update.device)
