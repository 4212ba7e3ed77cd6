"""ReFL: the reward's own gradient on x0, through the decoder, chunk by chunk.

Source: ImageReward (arXiv 2304.05977), as DMDR uses it: maximise R(decode(x0)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmdr_fast.algorithm.recipe import Batch, Decode
from dmdr_fast.algorithm.rl.experience import Scored, rows_of
from dmdr_fast.algorithm.rl.method import Metrics
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.simulation import Simulated
from dmdr_fast.algorithm.streams import Shard
from dmdr_fast.algorithm.update import Update


def leaf(method: ReFL, update: Update, sample: Simulated, x0: Tensor) -> tuple[Tensor, Metrics]:
    """ReFL's gradient on the leaf x0 of a micro-batch, and its mean rewards."""
    gradient, found = scored_gradient(method, update, sample.batch, sample.shard, x0)
    return gradient, found.means()


def scored_gradient(method: ReFL, update: Update, batch: Batch, shard: Shard, x0: Tensor) -> tuple[Tensor, Scored]:
    """ReFL's gradient on the leaf x0, and the rewards that it was taken of."""
    named: dict[str, list[Tensor]] = {}
    gradient, rewards = refl_leaf_gradient(x0, *_reward(update, batch, shard, named), method)
    return gradient, Scored(batch, shard, x0, rewards, {n: torch.cat(values) for n, values in named.items()})


def loss_on_x0(method: ReFL, update: Update, sample: Simulated) -> Tensor:
    """ReFL's loss of a micro-batch, 0-d."""
    return refl_loss(sample.rollout.x0, *_reward(update, sample.batch, sample.shard, {}), method)


def _reward(
    update: Update, batch: Batch, shard: Shard, named: dict[str, list[Tensor]]
) -> tuple[Decode, Callable[[Tensor, slice], Tensor]]:
    """The decoder, and (images, their rows) -> rewards; each one by its name is kept in ``named``."""
    reward, inputs, name = update.reward, batch.reward_inputs, update.name_of(shard)
    assert reward is not None  # RL has one

    def score(images: Tensor, rows: slice) -> Tensor:
        total, each = reward.score(images, rows_of(inputs, rows), name)
        for n, values in each.items():
            named.setdefault(n, []).append(values.detach())
        return total

    return reward.decode, score


def refl_leaf_gradient(
    x0: Tensor, decode: Decode, reward: Callable[[Tensor, slice], Tensor], options: ReFL
) -> tuple[Tensor, Tensor]:
    """d(loss)/d(x0) on the leaf x0 [B, ...], and the rewards fp32 [B], both detached.

    linear: loss = -mean R;  hinge: loss = mean max(0, margin - R), which leaves a sample above the margin alone.

    ``reward(images, rows)`` gets the images of ``rows`` of the batch and returns [rows] rewards, higher is better.
    The graph of one chunk is freed before the next is built: peak memory is that of ``options.chunk`` samples. With
    ``options.checkpoint`` it is the larger of the decoder's graph and the reward's, not their sum: the decoder runs
    again once the reward's backward has freed its own. The gradient is the same, to the bit where the decoder's
    kernels are deterministic.

    Raises:
        ValueError: the objective is not one of the two.
    """
    gradient, rewards = torch.empty_like(x0), x0.new_empty(x0.shape[0], dtype=torch.float32)
    for start in range(0, x0.shape[0], options.chunk):
        rows = slice(start, min(start + options.chunk, x0.shape[0]))
        with torch.enable_grad():
            leaf = x0[rows].detach().requires_grad_()
            images = checkpoint(decode, leaf, use_reentrant=False) if options.checkpoint else decode(leaf)
            values = reward(images, rows)
            losses = _losses(values, options)
            (gradient[rows],) = torch.autograd.grad(losses.sum() / x0.shape[0], leaf)
        rewards[rows] = values.detach()
        del images, values, losses  # else their storage lives on while the next chunk's graph is built
    return gradient, rewards


@torch.no_grad()
def refl_loss(x0: Tensor, decode: Decode, reward: Callable[[Tensor, slice], Tensor], options: ReFL) -> Tensor:
    """The loss of ``refl_leaf_gradient``, 0-d, alone; same arguments."""
    parts = [slice(start, start + options.chunk) for start in range(0, x0.shape[0], options.chunk)]
    return torch.cat([_losses(reward(decode(x0[rows]), rows).float(), options) for rows in parts]).mean()


def _losses(rewards: Tensor, options: ReFL) -> Tensor:
    if options.objective not in ("linear", "hinge"):
        raise ValueError(f"ReFL: objective must be 'linear' or 'hinge', got {options.objective!r}")
    return -rewards if options.objective == "linear" else torch.relu(options.margin - rewards)
