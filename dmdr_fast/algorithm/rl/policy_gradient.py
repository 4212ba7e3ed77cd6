"""GRPO: a policy gradient over the generator's own few steps, made stochastic.

    rollout   x_{i+1} = mean(x_i, v_i) + std n      the SDE of the steps, log-probs kept        no grad
    replay    r = p(x_{i+1} | x_i, now) / p(x_{i+1} | x_i, rollout)                             graded
    loss      mean max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_weight KL to a reference

A: :func:`~dmdr_fast.algorithm.rl.advantages.group_advantages`. Inside DMDR the DMD gradient takes the KL's place.
Source: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818), Flow-CPS (arXiv 2509.05952).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmdr_fast import ops
from dmdr_fast.algorithm.paths import clean_sample
from dmdr_fast.algorithm.recipe import Batch
from dmdr_fast.algorithm.rl.advantages import group_advantages
from dmdr_fast.algorithm.rl.experience import Experience, Scored, rl_index, scored
from dmdr_fast.algorithm.rl.grpo import GRPO
from dmdr_fast.algorithm.rl.method import Loss, Metrics
from dmdr_fast.algorithm.rollout import Network, whole_weights
from dmdr_fast.algorithm.streams import Shard
from dmdr_fast.algorithm.update import Update
from dmdr_fast.ops.dmd import Prediction

Score = Callable[[Update, Batch, Shard, Tensor], Scored]


@dataclass(frozen=True)
class Trajectory:
    """One stochastic rollout: all its samples, and the log-probs of its stochastic steps."""

    x: tuple[Tensor, ...]  # N + 1 samples [B, ...]: x[0] the noise, x[N] the final x0
    grid: tuple[float, ...]  # t_0 .. t_N
    logprob: Mapping[int, Tensor]  # step i -> log p(x[i + 1] | x[i]) [B], as the rollout's generator had it


@dataclass(frozen=True)
class Trajectories(Experience):
    """The trajectory of each scored micro-batch, and the advantage of each sample: fp32 [global batch]."""

    trajectories: list[Trajectory]
    advantages: Tensor
    method: GRPO

    def losses(self, update: Update) -> list[Loss]:
        """The clipped loss of each micro-batch at each of the steps that are trained."""
        stochastic = tuple(self.method.stochastic_steps(len(update.recipe.grid) - 1))
        steps = trained_steps(update.streams.rng("rl_steps", *update.counters), stochastic, self.method.trained_steps)
        return [partial(self._loss, update, part, i, len(steps)) for part in range(len(self.scored)) for i in steps]

    def _loss(self, update: Update, part: int, i: int, steps: int, generator: Network) -> tuple[Tensor, Metrics]:
        recipe, batch, rows = update.recipe, self.scored[part].batch, self.scored[part].shard.rows
        loss, stats = policy_loss(
            generator,
            self.trajectories[part],
            i,
            batch.condition,
            self.advantages[rows],
            self.kept[rows],
            self.method,
            kind=recipe.prediction,
            weight=recipe.rl_weight(update.step),
            reference=update.networks.reference if recipe.kl_weight else None,
            kl_weight=recipe.kl_weight,
        )
        return loss / steps, stats


def collect(method: GRPO, update: Update, score: Score = scored) -> Trajectories:
    """Sample groups by the SDE with the generator as it is, and score them by ``score``."""
    recipe, streams, step, device = update.recipe, update.streams, update.step, update.device
    index, parts, trajectories = rl_index(update), [], []
    shape = recipe.shapes[recipe.sizes(streams, index, 1)[0]]  # one for all: their rewards are compared
    for shard in update.shards:
        batch = update.data(index, shard, method.group_size)
        trajectory = sde_rollout(
            update.networks.generator,
            streams.noise("rl_rollout", step, 0, shape=shape, shard=shard, device=device),
            lambda i: streams.noise_seed("rl_sde", step, i, device=device),
            batch.condition,
            recipe.grid,
            method,
            offset=shard.start * math.prod(shape),
            kind=recipe.prediction,
        )
        parts.append(score(update, batch, shard, trajectory.x[-1]))
        trajectories.append(trajectory)
    advantages, kept = group_advantages(update.gather([p.rewards for p in parts]), method)
    return Trajectories(parts, kept, trajectories, advantages, method)


def trained_steps(rng: np.random.Generator, stochastic: tuple[int, ...], count: int | None) -> tuple[int, ...]:
    """``count`` different ones of the stochastic steps, each as likely as any other, in order; all with None."""
    return stochastic if count is None else tuple(sorted(rng.choice(stochastic, count, replace=False).tolist()))


@torch.no_grad()
def sde_rollout(
    generator: Network,
    noise: Tensor,
    seeds: Callable[[int], Tensor],
    condition: Any,
    grid: tuple[float, ...],
    options: GRPO,
    *,
    offset: int,
    kind: Prediction = "flow",
) -> Trajectory:
    """The full rollout from ``noise`` [B, ...] at t_0 = 1, its stochastic steps by ``ops.sde_step_logprob``.

    A last step that is not stochastic is x0 = x - t v. ``seeds(i)`` is the int64 [2] seed of step i's noise and
    ``offset`` the index of the batch's first element in it, so a sample does not depend on its company. ``kind``: what
    the generator predicts, ``flow`` or ``x0``. The samples keep the noise's dtype; log-probs are fp32 (fp64 for fp64).
    """
    stochastic = options.stochastic_steps(len(grid) - 1)
    x, samples, logprob = noise, [noise], {}
    with whole_weights(generator):
        for i in range(len(grid) - 1):
            if i in stochastic:
                v = _velocity(generator, x, grid[i], condition, kind)
                step = ops.sde_step_logprob(
                    x, v, grid[i], grid[i + 1], kind=options.sde, eta=options.eta, seed=seeds(i), offset=offset
                )
                x, logprob[i] = step.next_sample, step.logprob
            else:
                t = torch.full((x.shape[0],), grid[i], device=x.device)
                x = clean_sample(x, t, generator(x, t, condition), kind)
            samples.append(x)
    return Trajectory(tuple(samples), grid, logprob)


def policy_loss(
    generator: Network,
    trajectory: Trajectory,
    i: int,
    condition: Any,
    advantage: Tensor,
    kept: Tensor,
    options: GRPO,
    *,
    kind: Prediction = "flow",
    weight: float = 1.0,
    reference: Network | None = None,
    kl_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped loss of step i of a trajectory plus a KL, weighted, 0-d and graded, and its statistics.

        loss = weight mean_b max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_weight KL,  r = p_now / p_rollout
        KL   = mean (mean_now - mean_ref)^2 / (2 s^2),  per element, over the whole batch

    flow_grpo, dance: s = gam of the step (Flow-GRPO's: the KL over sqrt(t - t')); cps: s the step's std. A sample that
    is not ``kept`` (bool [B]) counts with A = 0: the mean stays over B and its ratio is still watched. As long as the
    generator is the one of the rollout, the ratios are exactly 1.

    The reference runs first and without grad. It may be the generator with an adapter switched off: what it leaves
    switched is what the generator's forward, and its recomputation in a backward, has to set for itself.

    Returns:
        loss, and 0-d fp32 without grad: ratio_mean, ratio_max_deviation (max |r - 1|), clip_fraction, approx_kl (to
        the rollout's generator, mean (log r)^2 / 2), and kl (to the reference) where there is one.
    """
    x, t, t_next = trajectory.x[i], trajectory.grid[i], trajectory.grid[i + 1]

    def replay(network: Network) -> ops.SDEStep:
        v = _velocity(network, x, t, condition, kind)
        return ops.sde_step_logprob(x, v, t, t_next, kind=options.sde, eta=options.eta, next_sample=trajectory.x[i + 1])

    with torch.no_grad():
        held = None if reference is None else replay(reference)
    with torch.enable_grad():
        step = replay(generator)
        loss, stats = ops.grpo_loss(
            step.logprob,
            trajectory.logprob[i],
            torch.where(kept, advantage, 0.0),
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            adv_clip=options.adv_clip,
        )
        loss = weight * loss
        found = {f"ratio_{name}": getattr(stats, name) for name in ("mean", "max_deviation")}
        found |= {name: getattr(stats, name) for name in ("clip_fraction", "approx_kl")}
        if held is not None:
            spread = step.std if options.sde == "cps" else step.std / (t - t_next) ** 0.5
            kl = ((step.mean - held.mean).square().flatten(1).mean(1) / (2 * spread.square())).mean()
            loss, found["kl"] = loss + kl_weight * kl, kl.detach()
    return loss, found


def _velocity(network: Network, x: Tensor, t: float, condition: Any, kind: Prediction) -> Tensor:
    """v at (x, t): the prediction itself, or (x - x0_hat) / t."""
    prediction = network(x, torch.full((x.shape[0],), t, device=x.device), condition)
    if kind == "flow":
        return prediction
    if kind == "x0":
        return (x - prediction) / t
    raise ValueError(f"grpo: kind must be 'flow' or 'x0', got {kind!r}")
