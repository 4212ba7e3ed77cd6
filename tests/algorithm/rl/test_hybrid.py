"""The hybrid's update against hand-written fp64, finite differences and a closed form; what it runs, and how often."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dmdr_fast import ops
from dmdr_fast.algorithm.recipe import Networks
from dmdr_fast.algorithm.rl.grpo import GRPO, GRPOOptions
from dmdr_fast.algorithm.rl.hybrid import Hybrid
from dmdr_fast.algorithm.rl.method import Setting
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.algorithm.step import dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.plan.cost import units
from dmdr_fast.plan.shapes import find_shape
from dmdr_fast.plan.workload import Workload

from ..networks import CLASSES, SHAPE, Denoiser, PlainRole, labels, recipe, reward_model, update
from .gaussians import Mean, log_density, step

CPU = torch.device("cpu")
B, K, ETA, WEIGHT, LR = 4, 2, 0.7, 0.6, 1e-2
MIX = torch.randn(SHAPE[0] * 16, CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def decode(x):
    return torch.tanh(x.double())


def rewards(images, labels):
    return torch.log_softmax(images.flatten(1) @ MIX, -1).gather(1, labels[:, None])[:, 0]


def method(epochs=1, **changes):
    policy = GRPO(group_size=K, eta=ETA, clip_low=1.0, clip_high=1.0, inner_epochs=epochs)
    return Hybrid(**({"refl_weight": 0.3, "grpo": policy, "refl": ReFL(chunk=3)} | changes))


def one_update(generator, hybrid, steps=3, **changes):
    role = PlainRole(generator, lr=LR)
    numbers = recipe(steps, method=hybrid, reward_weight=WEIGHT, regularizer="none", **changes)
    calls = {"decode": 0, "rewards": 0}

    def counted(name, function):
        def call(*given, **named):
            calls[name] += 1
            return function(*given, **named)

        return call

    reward = reward_model(counted("decode", decode), counted("rewards", rewards))
    now = update(Networks(role, None, None), numbers, Streams(3), [Shard(0, B, B)], reward=reward)
    return role, now, calls


def objective(generator, old, now, hybrid):
    """WEIGHT (mean over the stochastic steps of mean -A r + refl_weight mean -R), on the trajectory of ``old``."""
    grid, y = now.recipe.grid, now.data((0, 2), now.shards[0], K).condition
    x = [now.streams.noise("rl_rollout", 0, 0, shape=SHAPE, shard=now.shards[0], device=CPU).double()]
    drawn = []
    with torch.no_grad():
        for i, (t, t_next) in enumerate(pairwise(grid)):
            v = old(x[i], torch.full((B,), t), y)
            if t_next:
                mean, std = step(x[i], v, t, t_next, "flow_grpo", ETA)
                seed = now.streams.noise_seed("rl_sde", 0, i, device=CPU)
                x.append(mean + std * ops.normal_noise(x[i].float(), seed).double())
                drawn.append(log_density(x[-1], mean, std, "flow_grpo"))
            else:
                x.append(x[i] - t * v)
        found = rewards(decode(x[-1]), y).view(-1, K)
        spread = found.std(1, correction=0, keepdim=True) + 1e-4
        advantage = ((found - found.mean(1, keepdim=True)) / spread).flatten()
    loss = 0.0
    for i, before in enumerate(drawn):
        v = generator(x[i], torch.full((B,), grid[i]), y)
        mean, std = step(x[i], v, grid[i], grid[i + 1], "flow_grpo", ETA)
        ratio = (log_density(x[i + 1], mean, std, "flow_grpo") - before).exp()
        loss = loss - (advantage * ratio).mean() / len(drawn)
    x0 = x[-2] - grid[-2] * generator(x[-2], torch.full((B,), grid[-2]), y)
    return WEIGHT * (loss - hybrid.refl_weight * rewards(decode(x0), y).mean())


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_update_is_the_joint_losss_by_hand(epochs):
    """In a second epoch the ratios have moved, and the reward's gradient is that of the new x0."""
    generator, truth, old, hybrid = Denoiser(1), Denoiser(1), Denoiser(1), method(epochs)
    _, now, _ = one_update(generator, hybrid)
    metrics = dmdr_update(now).metrics
    for _ in range(epochs):
        gradients = torch.autograd.grad(objective(truth, old, now, hybrid), list(truth.parameters()))
        for parameter, gradient in zip(truth.parameters(), gradients, strict=True):
            parameter.data -= LR * gradient
    for got, want, start in zip(generator.parameters(), truth.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(got - start, want - start, rtol=1e-4, atol=1e-10)  # its noise is fp32
    assert {"reward", "kept", "ratio_mean"} <= set(metrics) and "dmd_loss" not in metrics


def test_the_gradient_is_that_of_finite_differences():
    generator, old, hybrid = Denoiser(1), Denoiser(1), method()
    _, now, _ = one_update(generator, hybrid)
    rng, h = torch.Generator().manual_seed(2), 1e-5
    ways = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in old.parameters()]

    def at(distance):
        moved = Denoiser(1)
        for parameter, way in zip(moved.parameters(), ways, strict=True):
            parameter.data += distance * way
        return objective(moved, old, now, hybrid)

    slope = (at(h) - at(-h)).item() / (2 * h)
    dmdr_update(now)
    pairs = zip(old.parameters(), generator.parameters(), ways, strict=True)
    got = sum(((before - after) / LR * way).sum().item() for before, after, way in pairs)
    assert got == pytest.approx(slope, rel=1e-4)


class OneGraph(PlainRole):
    """A role that has at most one graph at a time."""

    graphs = 0

    def __call__(self, x, t, condition):
        self.graphs += torch.is_grad_enabled()
        assert self.graphs <= 1
        return super().__call__(x, t, condition)

    def backward(self, loss, *, last):
        loss.backward()
        self.graphs -= 1


@pytest.mark.parametrize("trained", [None, 1])
def test_what_an_update_runs(trained):
    """N forwards without grad and the planner's graded ones, a graph at a time; decoder and reward once a chunk."""
    hybrid = method(grpo=GRPO(group_size=K, trained_steps=trained))
    _, now, calls = one_update(Denoiser(1), hybrid, steps=4)
    role, graded = OneGraph(Denoiser(1)), hybrid.graded_forwards(4)

    def no_graph_but_its_own(images, given, batch):
        assert role.graphs == 0
        return now.reward.score(images, given, batch)

    reward = replace(now.reward, score=no_graph_but_its_own)
    dmdr_update(update(Networks(role, None, None), now.recipe, now.streams, now.shards, reward=reward))
    assert graded == (trained or 3) + 1 and role.forwards == 4 + graded and role.graphs == 0
    assert calls == {"decode": 2, "rewards": 2}  # 3 and 1 of 4 samples, with grad
    work = Workload(find_shape("sit-xl-2"), policy_steps=graded, student_steps=4, activation="none")
    assert units(work)["policy rollout"] == 4 and units(work)["policy update"] == 3 * graded


def test_two_micro_batches_are_one():
    moved = []
    for shards in ([Shard(0, 4, 4)], [Shard(0, 2, 4), Shard(2, 4, 4)]):
        generator = Denoiser(1)
        role, now, _ = one_update(generator, method())
        parts = len(shards)
        role.backward = lambda loss, *, last, parts=parts: (loss / parts).backward()
        dmdr_update(update(now.networks, now.recipe, now.streams, shards, reward=now.reward))
        moved.append(list(generator.parameters()))
    for one, two, start in zip(*moved, Denoiser(1).parameters(), strict=True):
        torch.testing.assert_close(one - start, two - start, rtol=1e-6, atol=1e-12)


GOOD = Setting(4, "dmd", None, False, "sit", "flow")


@pytest.mark.parametrize(
    ("hybrid", "setting", "words"),
    [
        (method(grpo=GRPO(noisy_last_step=True)), GOOD, "rl.grpo.noisy_last_step: true"),
        (method(grpo=GRPOOptions(mode="advantage_weighted_dmd")), GOOD, "rl.grpo.mode: advantage_weighted_dmd"),
        (method(), Setting(1, "dmd", None, False, "sit", "flow"), "student.steps: 1"),
        (method(grpo=GRPO(trained_steps=4)), GOOD, "rl.grpo.trained_steps: 4 of 3"),
        (method(grpo=GRPO(group_size=1)), GOOD, "rl.grpo.group_size: 1"),
        (method(), Setting(4, "dmd", None, False, "sdxl", "eps"), "rl.method: the stochastic steps of grpo"),
    ],
)
def test_what_does_not_fit_is_refused(hybrid, setting, words):
    assert next(hybrid.problems(setting)).startswith(words)
    assert not list(method().problems(GOOD))


@pytest.mark.parametrize("refl_weight", [0.1, 1.0])
def test_it_ends_between_the_goal_and_the_reference_as_its_weight_says(refl_weight):
    """A Gaussian policy of two steps, the reward -|x0 - goal|^2 / 2, A = R - group mean, and a KL on the first step.

    x_1 = a z + mu / 2 + s n and x0 = x_1 + mu / 2. The expected gradient is -pull (goal - mu) + hold (mu - start): of
    GRPO (1 - 1/K) / 4, of ReFL refl_weight / 2, of the KL kl_weight / (8 gam^2) with gam^2 = 2 eta^2.
    """
    start, goal, size, kl_weight = torch.tensor([0.5, -0.25]), torch.tensor([1.5, 0.75]), 1024, 8.0
    policy = Mean(start)
    grpo = GRPO(group_size=8, eta=ETA, std="none", adv_clip=1e6, clip_low=1.0, clip_high=1.0)
    numbers = recipe(
        2,
        grid=timestep_grid(2),
        latent_shape=(2,),
        method=Hybrid(refl_weight, grpo),
        reward_weight=1.0,
        regularizer="kl",
        kl_weight=kl_weight,
    )
    reward = reward_model(lambda x: x, lambda images, labels: -0.5 * (images - goal).square().sum(1))
    nets, path = Networks(PlainRole(policy, lr=0.5), None, None, reference=Mean(start)), []
    for i in range(30):
        dmdr_update(update(nets, numbers, Streams(1), [Shard(0, size, size)], step=i, data=labels, reward=reward))
        path.append(policy.mu.detach().clone())
    pull, hold = (1 - 1 / 8) / 4 + refl_weight / 2, kl_weight / (16 * ETA**2)
    optimum = (pull * goal + hold * start) / (pull + hold)
    torch.testing.assert_close(torch.stack(path[10:]).mean(0), optimum, rtol=0, atol=0.03)
