"""NFT: reinforcement learning by a denoising loss, on the forward process instead of the sampler's steps.

    x_t   = (1 - t) x0 + t noise,  v* = noise - x0           of a scored sample x0
    v+    = (1 - b) v_old + b v,   v- = (1 + b) v_old - b v   v_old: as the generator was when it drew the samples
    loss  = r |v+ - v*|^2 + (1 - r) |v- - v*|^2,              r = 1/2 + clip(A, -1, 1) / 2

A: :func:`~dmdr_fast.algorithm.rl.advantages.group_advantages`. Source: DiffusionNFT (arXiv 2509.16117).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dmdr_fast import ops
from dmdr_fast.algorithm.paths import target
from dmdr_fast.algorithm.rl.advantages import group_advantages
from dmdr_fast.algorithm.rl.experience import Experience, Scored, denoising_times, sampled_groups
from dmdr_fast.algorithm.rl.method import Loss, Metrics
from dmdr_fast.algorithm.rl.nft import NFT
from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class Compared(Experience):
    """Scored samples and the advantage of each: fp32 [global batch]."""

    advantages: Tensor
    method: NFT

    def losses(self, update: Update) -> list[Loss]:
        """The loss of each micro-batch."""
        return [partial(self._loss, update, part) for part in self.scored]

    def _loss(self, update: Update, part: Scored, generator: Network) -> tuple[Tensor, Metrics]:
        recipe, streams, shard, x0 = update.recipe, update.streams, part.shard, part.x0
        t = denoising_times(update, "nft_t", shard, self.method.times)
        noise = streams.noise("nft_noise", *update.counters, shape=x0.shape[1:], shard=shard, device=x0.device)
        better = torch.where(self.kept[shard.rows], self.advantages[shard.rows], 0.0).clamp(-1.0, 1.0)
        x_t = ops.renoise(x0, *recipe.path.alpha_sigma(t), noise=noise)
        with torch.enable_grad():
            v = generator(x_t, t, part.batch.condition)
            loss, errors = nft_loss(v, v.detach(), target(x0, noise), better, self.method.beta)
        found = {"nft_error": errors.mean(), "nft_margin": -(better * errors).mean()}
        return recipe.rl_weight(update.step) * loss, found


def collect(method: NFT, update: Update) -> Compared:
    """Sample groups with the generator as it is, and score them."""
    parts = sampled_groups(update, method.group_size)
    advantages, kept = group_advantages(update.gather([p.rewards for p in parts]), method)
    return Compared(parts, kept, advantages, method)


def nft_loss(v: Tensor, v_old: Tensor, goal: Tensor, better: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """mean over samples of r |v+ - v*|^2 + (1 - r) |v- - v*|^2, 0-d and graded, and the errors |v - v*|^2 [B].

    Squares are means over a sample's elements, in fp32 (fp64 for fp64). At v = v_old the loss is that of plain
    denoising, and its gradient 2 b clip(A) (v - v*) per element: towards the samples that beat their group, away from
    those that lost.

    Args:
        v, v_old: the prediction at x_t and the old one, a constant [B, ...]. goal: v* [B, ...].
        better: clip(A, -1, 1) = 2 r - 1, [B].
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    v, v_old, goal = v.to(dtype), v_old.detach().to(dtype), goal.to(dtype)

    def errors(prediction: Tensor) -> Tensor:
        return (prediction - goal).square().flatten(1).mean(1)

    r, moved = 0.5 + 0.5 * better.to(dtype), beta * (v - v_old)
    loss = r * errors(v_old + moved) + (1.0 - r) * errors(v_old - moved)
    return loss.mean(), errors(v.detach())
