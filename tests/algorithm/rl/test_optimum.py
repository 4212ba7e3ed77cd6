"""Two-dimensional Gaussian policies whose optimum is known in closed form: GRPO and DPO move to it.

The generator is v = -mu at every time, so a one-step student's x0 is noise + mu: a Gaussian around its only parameter.
"""

import pytest
import torch

from dmdr_fast import ops
from dmdr_fast.algorithm.rl.advantages import best_and_worst, group_advantages
from dmdr_fast.algorithm.rl.dpo import DPO
from dmdr_fast.algorithm.rl.grpo import GRPO
from dmdr_fast.algorithm.rl.policy_gradient import policy_loss, sde_rollout
from dmdr_fast.algorithm.rl.preference import dpo_loss
from dmdr_fast.algorithm.schedules import timestep_grid

from .gaussians import Mean

START = torch.tensor([0.5, -0.25])
GOAL = torch.tensor([1.5, 0.75])
B, K = 2048, 8


def noise(update, purpose, rows=B):
    return ops.normal_noise(torch.empty(rows, 2), torch.tensor([purpose, update]))


def descend(policy, loss_of, lr, updates):
    """Gradient descent; the mean of the last half, whose noise averages out."""
    path = []
    for update in range(updates):
        (gradient,) = torch.autograd.grad(loss_of(update), policy.mu)
        policy.mu.data -= lr * gradient
        path.append(policy.mu.detach().clone())
    return torch.stack(path[updates // 2 :]).mean(0)


def grpo(numbers, steps, *, kl_weight=0.0, lr=0.5, updates=60):
    """Where GRPO takes the policy under the reward -|x0 - goal|^2 / 2."""
    policy, reference, none = Mean(START), Mean(START), torch.empty(0)
    grid = timestep_grid(steps)

    def loss(update):
        seeds = lambda i: torch.tensor([100 + i, update])  # noqa: E731
        trajectory = sde_rollout(policy, noise(update, 0), seeds, none, grid, numbers, offset=0)
        rewards = -0.5 * (trajectory.x[-1] - GOAL).square().sum(1)
        advantage, kept = group_advantages(rewards, numbers)
        held = {"reference": reference, "kl_weight": kl_weight} if kl_weight else {}
        losses = [
            policy_loss(policy, trajectory, i, none, advantage, kept, numbers, **held)[0] for i in trajectory.logprob
        ]
        return torch.stack(losses).mean()

    return descend(policy, loss, lr, updates)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_grpo_of_one_step_ends_where_the_reward_is_highest(std):
    numbers = GRPO(group_size=K, eta=0.7, noisy_last_step=True, std=std)
    # x0 = (1 - eta^2 / 2) noise + mu + eta n: its mean is mu, whatever the noise.
    torch.testing.assert_close(grpo(numbers, 1), GOAL, rtol=0, atol=0.03)


@pytest.mark.parametrize(("kind", "eta"), [("flow_grpo", 0.7), ("dance", 0.5), ("cps", 0.8)])
def test_grpo_of_two_steps_ends_where_the_reward_is_highest(kind, eta):
    """x_1 = a z + mu / 2 + s n, since b = -1/2 at t = 1 for all kinds, and x0 = x_1 + mu / 2: E x0 is mu."""
    rate = 5.0 if kind == "cps" else 0.5  # the log-prob of cps lacks the 1 / (2 s^2)
    got = grpo(GRPO(group_size=K, sde=kind, eta=eta), 2, lr=rate)
    torch.testing.assert_close(got, GOAL, rtol=0, atol=0.03)


@pytest.mark.parametrize("kl_weight", [0.25, 1.0])
def test_grpo_with_a_kl_ends_between_the_goal_and_the_reference(kl_weight):
    """With A = R - group mean the expected gradient is -((1 - 1/K) (goal - mu) - kl (mu - start) / eta^2) / 2."""
    eta = 0.7
    numbers = GRPO(group_size=K, eta=eta, noisy_last_step=True, std="none", adv_clip=1e6)
    pull, hold = 1 - 1 / K, kl_weight / eta**2
    optimum = (pull * GOAL + hold * START) / (pull + hold)
    torch.testing.assert_close(grpo(numbers, 1, kl_weight=kl_weight), optimum, rtol=0, atol=0.03)


def online_pairs(x0, rewards, group_size):
    winners, losers, _ = best_and_worst(rewards, group_size)
    return x0[winners], x0[losers]


def test_dpo_against_itself_ends_where_the_reward_is_highest():
    """The reference follows the generator: the expected step is along E[x_w - x_l], which is 0 only at the goal."""
    policy, t, group = Mean(START), torch.ones(B // 4), 4

    def loss(update):
        x0 = noise(update, 1) + policy.mu.detach()
        pair = online_pairs(x0, -0.5 * (x0 - GOAL).square().sum(1), group)
        return dpo_loss(policy, policy, *pair, t, noise(update, 2, B // 4), t, DPO(beta=1.0))[0]

    torch.testing.assert_close(descend(policy, loss, 0.5, 60), GOAL, rtol=0, atol=0.03)


@pytest.mark.parametrize("beta", [2.0, 5.0])
def test_dpo_ends_at_the_optimum_of_bradley_terry(beta):
    """P(w > l) = sigmoid(slope . (w - l)), a linear reward with Gumbel noise: mu = start + 2 slope / beta.

    On this policy the loss's argument is beta / 2 (mu - start) . (x_w - x_l), so DPO is the logistic regression that
    finds the slope, and its optimum is that of E R - KL, as the paper derives it.
    """
    slope = torch.tensor([1.0, 0.5])
    policy, reference, t = Mean(START), Mean(START), torch.ones(B // 2)

    def loss(update):
        x0 = noise(update, 3) + policy.mu.detach()
        u = torch.rand(B, generator=torch.Generator().manual_seed(update)).clamp(1e-6, 1 - 1e-6)
        pair = online_pairs(x0, x0 @ slope - torch.log(-torch.log(u)), 2)
        return dpo_loss(policy, reference, *pair, t, noise(update, 4, B // 2), t, DPO(beta=beta))[0]

    got = descend(policy, loss, 4.0 / beta**2, 80)
    torch.testing.assert_close(got, START + 2 * slope / beta, rtol=0, atol=0.06 / beta)
