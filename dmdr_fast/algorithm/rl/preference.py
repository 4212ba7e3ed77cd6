"""DPO: of two samples of one condition, the generator comes to denoise the preferred one better than its reference.

Source: Diffusion-DPO (arXiv 2311.12908), online: the pair is the best and the worst of a group of the generator's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast import ops
from dmdr_fast.algorithm.paths import FLOW, Path, target
from dmdr_fast.algorithm.recipe import Batch
from dmdr_fast.algorithm.rl.advantages import best_and_worst
from dmdr_fast.algorithm.rl.dpo import DPO
from dmdr_fast.algorithm.rl.experience import Experience, denoising_times, rl_index, sampled_groups
from dmdr_fast.algorithm.rl.method import Loss, Metrics
from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.algorithm.score_pass import join
from dmdr_fast.algorithm.streams import Shard
from dmdr_fast.algorithm.update import Update
from dmdr_fast.ops.dmd import Prediction


@dataclass(frozen=True)
class Pairs:
    """One micro-batch's part of ``shard.total`` pairs: samples [P, ...], their condition, and fp32 weights [P]."""

    winner: Tensor
    loser: Tensor
    batch: Batch
    shard: Shard
    weight: Tensor


@dataclass(frozen=True)
class Preferences(Experience):
    """Scored samples, and this rank's pairs of all ranks' samples, for each micro-batch."""

    pairs: list[Pairs]
    method: DPO

    def losses(self, update: Update) -> list[Loss]:
        """The loss of each micro-batch's pairs."""
        return [partial(self._loss, update, pairs) for pairs in self.pairs]

    def _loss(self, update: Update, pairs: Pairs, generator: Network) -> tuple[Tensor, Metrics]:
        recipe, streams, shard, device = update.recipe, update.streams, pairs.shard, update.device
        draw, shape = update.counters, pairs.winner.shape[1:]
        assert update.networks.reference is not None  # a run with DPO has one
        loss, stats = dpo_loss(
            generator,
            update.networks.reference,
            pairs.winner,
            pairs.loser,
            denoising_times(update, "dpo_t", shard, self.method.times),
            streams.noise("dpo_noise", *draw, shape=shape, shard=shard, device=device),
            pairs.batch.condition,
            self.method,
            prediction=recipe.prediction,
            path=recipe.path,
            weight=pairs.weight,
        )
        return recipe.rl_weight(update.step) * loss, {f"dpo_{name}": value for name, value in stats.items()}


def collect(method: DPO, update: Update) -> Preferences:
    """Sample groups with the generator as it is, score them and pair the best of each with the worst."""
    device, parts = update.device, sampled_groups(update, method.group_size)
    winners, losers, gap = best_and_worst(update.gather([p.rewards for p in parts]), method.group_size)
    x0, pairs = update.gather([p.x0 for p in parts]), []
    for whole in update.shards:
        shard, weight = pair_share(len(gap), whole, device)
        mine = shard.rows
        # A NaN reward must not pass for a tie: it makes the weight, and so the loss, NaN, and the update is skipped.
        weight = weight * torch.where(gap[mine].isnan(), gap[mine], (gap[mine] > 0).float())
        batch = update.data(rl_index(update), shard, 1)  # the groups' conditions, one for each pair
        pairs.append(Pairs(x0[winners[mine]], x0[losers[mine]], batch, shard, weight))
    return Preferences(parts, (gap > 0).repeat_interleave(method.group_size), pairs, method)


def pair_share(pairs: int, shard: Shard, device: torch.device) -> tuple[Shard, Tensor]:
    """Which of ``pairs`` pairs share number ``shard.start / shard.size`` of the global batch trains on, with weights.

    Shares have one size on all ranks; where the pairs do not divide evenly, shares overlap and a pair that is in
    another share already has weight 0. The other weights are such that the average over shares of mean(weight * loss)
    is the mean loss of all pairs.
    """
    shares = shard.total // shard.size
    size = -(-pairs // shares)
    wanted = (shard.start // shard.size) * size
    start = min(wanted, pairs - size)
    first_here = (torch.arange(start, start + size, device=device) >= wanted).float()
    return Shard(start, start + size, pairs), first_here * (shares * size / pairs)


def dpo_loss(
    generator: Network,
    reference: Network,
    x0_w: Tensor,
    x0_l: Tensor,
    t: Tensor,
    noise: Tensor,
    condition: Any,
    options: DPO,
    *,
    prediction: Prediction = "flow",
    path: Path = FLOW,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean over pairs of -log sigmoid(-beta/2 ((e_w - e_w_ref) - (e_l - e_l_ref))), 0-d and graded.

    e = mean over a sample of (prediction - target)^2 at x_t = alpha x0 + sigma noise, in fp32 (fp64 for fp64); target:
    ``flow`` noise - x0, ``eps`` noise, ``x0`` x0. Both samples of a pair have the same t and the same noise, and are
    one batch: [all winners | all losers].

    Args:
        generator, reference: networks of (x_t, t, condition). The reference runs first, without grad; it may be the
            generator with an adapter switched off.
        x0_w, x0_l: the preferred sample and the other [P, ...]; constants.
        t: fp32 [P], the pair's. noise: x0_w's shape. condition: the pair's (tensor, or dictionary of them, batch P).
        prediction: what the networks predict, on ``path``.
        weight: fp32 [P], of each pair in the mean; 1 by default.

    Returns:
        loss, and 0-d without grad: margin, the mean of the sigmoid's argument; accuracy, the fraction of pairs where
        it is above 0 (0 while the generator is the reference).

    Raises:
        ValueError: the prediction is not one of the three.
    """
    clean, twice = torch.cat((x0_w, x0_l)).detach(), torch.cat((noise, noise))
    goal, times, conditions = target(clean, twice, prediction), t.repeat(2), join(condition, condition)
    alpha, sigma = path.alpha_sigma(times)
    x_t = ops.renoise(clean, alpha, sigma, noise=twice)
    dtype = torch.promote_types(clean.dtype, torch.float32)

    def error_gap(network: Network) -> Tensor:
        """e_w - e_l [P]."""
        difference = network(x_t, times, conditions).to(dtype) - goal.to(dtype)
        winner, loser = difference.square().flatten(1).mean(1).chunk(2)
        return winner - loser

    with torch.no_grad():
        held = error_gap(reference)
    with torch.enable_grad():
        margin = -0.5 * options.beta * (error_gap(generator) - held)
        each = -F.logsigmoid(margin)
        loss = (each if weight is None else weight * each).mean()
    margin = margin.detach()
    return loss, {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()}
