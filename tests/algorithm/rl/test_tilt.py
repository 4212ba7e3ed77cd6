"""The tilted cold start: DMD with a reward ends at the teacher's distribution times exp(reward / beta)."""

import pytest
import torch

from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.algorithm.recipe import Networks
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.schedules import RenoiseLaw
from dmdr_fast.algorithm.score_pass import separate_scores
from dmdr_fast.algorithm.step import dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams

from ..networks import PlainRole, recipe, reward_model, update
from .gaussians import Mean


class GaussianScore(torch.nn.Module):
    """The velocity of data N(mu(), I): x0_hat = mu + (1 - t) (x_t - (1 - t) mu) / ((1 - t)^2 + t^2)."""

    def __init__(self, mu):
        super().__init__()
        self.mu, self.nothing = mu, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, condition):
        mu, t = self.mu().detach(), t[:, None]
        x0 = mu + (1 - t) * (x - (1 - t) * mu) / ((1 - t) ** 2 + t**2)
        return (x - x0) / t + self.nothing


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.25])
def test_it_ends_at_the_tilted_teacher(weight):
    """Teacher N(m, I), reward slope . x: the tilted teacher is N(m + slope / beta, I).

    The DMD gradient of mu, unnormalised, is (mu - m) E[t^2 / ((1 - t)^2 + t^2)] / D = (mu - m) / 2 / D for t uniform,
    that of the reward -weight slope: 1 / beta = 2 D weight.
    """
    start, teacher, slope, size = torch.tensor([0.5, -0.25]), torch.tensor([-0.5, 1.0]), torch.tensor([1.0, -0.6]), 512
    policy, path = Mean(start), []
    fake = PlainRole(GaussianScore(lambda: policy.mu), lr=0.0)
    nets = Networks(PlainRole(policy, lr=1.0), fake, separate_scores(fake, GaussianScore(lambda: teacher)))
    numbers = recipe(
        1,
        latent_shape=(2,),
        cold_start_steps=100,
        tilt=ReFL(),
        tilt_weight=weight,
        fake_updates=1,
        renoise=RenoiseLaw("uniform"),
        dmd=DMDOptions(normalizer="none"),
    )
    reward = reward_model(lambda x: x, lambda images, labels: images @ slope)
    for i in range(60):
        metrics = dmdr_update(update(nets, numbers, Streams(1), [Shard(0, size, size)], step=i, reward=reward)).metrics
        path.append(policy.mu.detach().clone())
    assert {"reward", "rl_grad_ratio", "dmd_loss", "fake_loss"} <= set(metrics)
    torch.testing.assert_close(torch.stack(path[30:]).mean(0), teacher + 4 * weight * slope, rtol=0, atol=0.03)
