"""What a group-based method learns from: samples of the generator, their rewards, their advantages.

Groups of K samples share a condition and lie side by side in the global batch. Whether a group is whole on one rank or
spread over several does not matter: statistics are taken of the gathered rewards, the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.algorithm.recipe import Batch
from dmdr_fast.algorithm.rl.method import Loss, Metrics
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
        parts = [{n: v.mean() for n, v in ({"reward": s.rewards} | s.named).items()} for s in self.scored]
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
