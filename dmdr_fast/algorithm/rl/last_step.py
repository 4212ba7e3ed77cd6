"""Hybrid of GRPO and ReFL: the last step of GRPO's own trajectory, which is deterministic, takes the reward's gradient.

    rollout   x_{i+1} = mean(x_i, v_i) + std n, i < N - 1;  x0 = x_{N-1} - t_{N-1} v_{N-1}       no grad
    R, dR/dx0 through the decoder, chunk by chunk                                              once, on the leaf x0
    loss      policy loss of the steps i < N - 1 + refl_weight ReFL's loss of x0(x_{N-1})        one graph at a time

Both by :mod:`~dmdr_fast.algorithm.rl.policy_gradient` and :mod:`~dmdr_fast.algorithm.rl.reward_gradient`. The steps
before the last learn from which samples beat their group, the last from where the reward rises.
Source: arXiv 2605.26108.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dmdr_fast.algorithm.recipe import Batch
from dmdr_fast.algorithm.rl import policy_gradient
from dmdr_fast.algorithm.rl.experience import Experience, Scored
from dmdr_fast.algorithm.rl.hybrid import Hybrid
from dmdr_fast.algorithm.rl.method import Loss, Metrics
from dmdr_fast.algorithm.rl.reward_gradient import scored_gradient
from dmdr_fast.algorithm.rollout import Network, Rollout
from dmdr_fast.algorithm.simulation import Simulated, one_step
from dmdr_fast.algorithm.streams import Shard
from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class Both(Experience):
    """GRPO's trajectories, and ReFL's gradient on the x0 of each micro-batch, by the generator that drew it."""

    policy: policy_gradient.Trajectories
    gradients: list[Tensor]
    method: Hybrid

    def losses(self, update: Update) -> list[Loss]:
        """GRPO's, then ReFL's on the last step of each micro-batch."""
        return [*self.policy.losses(update), *(partial(self._last, update, p) for p in range(len(self.scored)))]

    def _last(self, update: Update, part: int, generator: Network) -> tuple[Tensor, Metrics]:
        recipe, scored, gradient = update.recipe, self.scored[part], self.gradients[part]
        x_in, t = self.policy.trajectories[part].x[-2], recipe.grid[-2]
        t_in = torch.full((x_in.shape[0],), t, device=x_in.device)
        sample = Simulated(scored.batch, Rollout(x_in, t_in, scored.x0, reuse=True), scored.shard)
        if update.epoch:  # the generator has moved since it drew x0
            with torch.no_grad():
                x0 = one_step(update.networks.generator, sample, recipe)
            gradient, _ = self.method.refl.leaf(update, sample, x0)
        weight = recipe.rl_weight(update.step) * self.method.refl_weight
        return weight * (one_step(generator, sample, recipe) * gradient).sum(), {}


def collect(method: Hybrid, update: Update) -> Both:
    """Sample groups as GRPO does; their rewards come with the gradients, so decoder and reward run once."""
    gradients: list[Tensor] = []

    def score(update: Update, batch: Batch, shard: Shard, x0: Tensor) -> Scored:
        gradient, found = scored_gradient(method.refl, update, batch, shard, x0)
        gradients.append(gradient)
        return found

    policy = policy_gradient.collect(method.grpo, update, score)
    return Both(policy.scored, policy.kept, policy, gradients, method)
