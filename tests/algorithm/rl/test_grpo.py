"""The stochastic rollout and the policy loss against torch.distributions and hand-written fp64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dmdr_fast import ops
from dmdr_fast.algorithm.rl.advantages import guidance_weights
from dmdr_fast.algorithm.rl.grpo import GRPO
from dmdr_fast.algorithm.rl.method import Setting
from dmdr_fast.algorithm.rl.policy_gradient import (
    Trajectory,
    policy_loss,
    sde_rollout,
    trained_steps,
)
from dmdr_fast.algorithm.rollout import sample
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.models.sit import SiT

from ..networks import CLASSES, SHAPE, Denoiser
from .gaussians import KINDS, gamma, log_density, step

B = 6
RNG = torch.Generator().manual_seed(3)
NOISE = torch.randn(B, *SHAPE, dtype=torch.float64, generator=RNG)
Y = torch.arange(B) % CLASSES
ADVANTAGE = torch.tensor([1.0, -1.0, 0.5, -2.0, 7.0, 3.0], dtype=torch.float64)
KEPT = torch.tensor([True, True, True, True, True, False])
CASES = [(kind, last) for kind in KINDS for last in (False, True) if (kind, last) != ("cps", True)]


def seeds(i):
    return torch.tensor([11, i])


def options(kind, **changes):
    return GRPO(sde=kind, eta=KINDS[kind], **changes)


def rollout(network, numbers, steps=3, noise=NOISE, kind="flow"):
    return sde_rollout(network, noise, seeds, Y, timestep_grid(steps), numbers, offset=5, kind=kind)


def as_x0(network):
    """The same network, predicting x0."""
    return lambda x, t, y: x - t.view(-1, 1, 1, 1) * network(x, t, y)


@pytest.mark.parametrize("prediction", ["flow", "x0"])
@pytest.mark.parametrize(("kind", "last"), CASES)
def test_rollout(kind, last, prediction):
    network, numbers = Denoiser(1), options(kind, noisy_last_step=last)
    trajectory = rollout(network if prediction == "flow" else as_x0(network), numbers, kind=prediction)
    grid, x = timestep_grid(3), NOISE
    assert trajectory.grid == grid and set(trajectory.logprob) == set(range(3 if last else 2))
    for i, (t, t_next) in enumerate(pairwise(grid)):
        with torch.no_grad():
            v = network(x, torch.full((B,), t), Y)
        if i in trajectory.logprob:
            mean, std = step(x, v, t, t_next, kind, KINDS[kind])
            x = mean + std * ops.normal_noise(NOISE, seeds(i), offset=5)
            torch.testing.assert_close(trajectory.logprob[i], log_density(x, mean, std, kind))
        else:
            x = x - t * v
        torch.testing.assert_close(trajectory.x[i + 1], x)
    assert len(trajectory.x) == 4 and trajectory.x[0] is NOISE


def test_a_sample_does_not_depend_on_its_company():
    network, numbers = Denoiser(1), options("flow_grpo")
    whole = rollout(network, numbers)
    size = NOISE[0].numel()
    part = sde_rollout(network, NOISE[2:4], seeds, Y[2:4], whole.grid, numbers, offset=5 + 2 * size)
    torch.testing.assert_close(part.x[-1], whole.x[-1][2:4], rtol=1e-12, atol=1e-12)


def test_cps_with_little_noise_is_the_deterministic_sampler():
    """It keeps the coefficients of the noise level, so its limit is x_{t'} = (1 - t') x0 + t' noise_hat (Euler)."""
    network, grid = Denoiser(1), timestep_grid(2)
    trajectory = sde_rollout(network, NOISE, seeds, Y, grid, GRPO(sde="cps", eta=1e-9), offset=0)
    with torch.no_grad():
        x = NOISE - 0.5 * network(NOISE, torch.ones(B), Y)
        x = x - 0.5 * network(x, torch.full((B,), 0.5), Y)
    torch.testing.assert_close(trajectory.x[-1], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "last"), CASES)
def test_policy_loss(kind, last):
    """Two policies, asymmetric bounds among the ratios, an advantage beyond its bound, a sample not kept, a KL."""
    old, now, reference = Denoiser(1), Denoiser(1), Denoiser(4)
    noise = torch.randn(now.outer.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with torch.no_grad():
        now.outer.add_(2e-3 * noise)
    trajectory = rollout(old, options(kind, noisy_last_step=last))
    for i in trajectory.logprob:
        t, t_next = trajectory.grid[i : i + 2]
        time, x, target = torch.full((B,), t), trajectory.x[i], trajectory.x[i + 1]
        means, logprobs = [], []
        for network in (now, old, reference):
            mean, std = step(x, network(x, time, Y), t, t_next, kind, KINDS[kind])
            means.append(mean)
            logprobs.append(log_density(target, mean, std, kind))
        log_ratio = logprobs[0] - logprobs[1].detach()
        ratio = log_ratio.exp()
        farthest = (ratio - 1).abs().max().item()
        low, high = 0.5 * farthest, 0.6 * farthest
        a = torch.tensor([1.0, -1.0, 0.5, -2.0, 5.0, 0.0], dtype=torch.float64)
        clipped = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high)).sum() / B
        spread = torch.tensor(std if kind == "cps" else gamma(t, t_next, kind, KINDS[kind]), dtype=torch.float64)
        kl = kl_divergence(Normal(means[0], spread), Normal(means[2].detach(), spread)).mean()
        expected = clipped + 0.7 * kl

        numbers = options(kind, noisy_last_step=last, clip_low=low, clip_high=high)
        loss, stats = policy_loss(now, trajectory, i, Y, ADVANTAGE, KEPT, numbers, reference=reference, kl_weight=0.7)
        torch.testing.assert_close(loss, expected)
        gradients = (torch.autograd.grad(value, list(now.parameters())) for value in (loss, expected))
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want)
        outside = ((ratio < 1 - low) | (ratio > 1 + high)).double().mean()
        assert 0 < outside < 1
        truth = {
            "ratio_mean": ratio.mean(),
            "ratio_max_deviation": (ratio - 1).abs().max(),
            "clip_fraction": outside,
            "approx_kl": log_ratio.square().mean() / 2,
            "kl": kl,
        }
        assert set(stats) == set(truth)
        for name, value in truth.items():
            torch.testing.assert_close(stats[name], value.detach())


def test_gradcheck():
    """Of the whole policy loss in a parameter, where neither max nor clip has a corner."""
    network, reference, numbers = (
        Denoiser(1, width=3),
        Denoiser(4, width=3),
        options("flow_grpo", clip_low=0.5, clip_high=0.5),
    )
    trajectory = rollout(Denoiser(1, width=3), numbers)

    def loss(label):
        call = lambda x, t, y: torch.func.functional_call(network, {"label": label}, (x, t, y))  # noqa: E731
        return policy_loss(call, trajectory, 1, Y, ADVANTAGE, KEPT, numbers, reference=reference, kl_weight=0.5)[0]

    assert torch.autograd.gradcheck(loss, network.label.detach().clone().requires_grad_())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "last"), CASES)
def test_first_ratios_are_exactly_one(kind, last, dtype, backend, monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", backend)
    monkeypatch.setenv("DMDR_FAST_STRICT", "1")
    torch.manual_seed(0)
    network = SiT(input_size=4, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=CLASSES).to(dtype)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.5)
    numbers = options(kind, noisy_last_step=last)
    trajectory = rollout(network, numbers, noise=NOISE.float())
    assert trajectory.x[-1].isfinite().all()
    for i in trajectory.logprob:
        loss, stats = policy_loss(
            network, trajectory, i, Y, ADVANTAGE.float(), KEPT, numbers, reference=network, kl_weight=1.0
        )
        assert (stats["ratio_mean"], stats["ratio_max_deviation"], stats["clip_fraction"]) == (1.0, 0.0, 0.0)
        assert (stats["approx_kl"], stats["kl"]) == (0.0, 0.0)
        assert loss.item() == pytest.approx(-(1 - 1 + 0.5 - 2 + 5) / B, rel=1e-6)
        loss.backward()
        assert network.final_layer.linear.weight.grad.abs().max() > 0


def test_the_reference_runs_first_and_without_grad():
    seen = []

    def named(name, network):
        return lambda x, t, y: seen.append((name, torch.is_grad_enabled())) or network(x, t, y)

    numbers = options("dance")
    trajectory = rollout(Denoiser(1), numbers)
    networks = named("generator", Denoiser(1)), named("reference", Denoiser(1))
    policy_loss(networks[0], trajectory, 0, Y, ADVANTAGE, KEPT, numbers, reference=networks[1], kl_weight=1.0)
    assert seen == [("reference", False), ("generator", True)]


def test_stochastic_steps():
    assert list(GRPO().stochastic_steps(4)) == [0, 1, 2]
    assert list(GRPO(noisy_last_step=True).stochastic_steps(4)) == [0, 1, 2, 3]
    assert list(GRPO(noisy_last_step=True).stochastic_steps(1)) == [0]
    assert list(GRPO(sde="cps", noisy_last_step=True).stochastic_steps(4)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (GRPO(), "rl.grpo: no step of a 1-step student is stochastic with sde flow_grpo"),
        (GRPO(sde="cps", noisy_last_step=True), "rl.grpo: no step of a 1-step student is stochastic with sde cps"),
        (GRPO(noisy_last_step=True, trained_steps=2), "rl.grpo.trained_steps: 2 of 1 stochastic step"),
    ],
)
def test_a_student_without_stochastic_steps_is_refused(numbers, message):
    assert next(numbers.problems(Setting(1, "dmd", None, False, "sit", "flow"))).startswith(message)


def test_trained_steps_are_drawn_evenly():
    rng, counts = np.random.default_rng(0), np.zeros(5)
    for _ in range(2000):
        drawn = trained_steps(rng, (0, 1, 2, 4), 2)
        assert len(drawn) == 2 and drawn[0] < drawn[1] and all(type(i) is int for i in drawn)
        counts[list(drawn)] += 1
    assert counts[3] == 0 and np.abs(counts[[0, 1, 2, 4]] / 2000 - 0.5).max() < 0.05
    assert trained_steps(rng, (0, 1, 2), None) == (0, 1, 2)


def test_guidance_weights():
    advantage = torch.tensor([0.5, -0.5, 9.0, -9.0, 2.0])
    kept = torch.tensor([True, True, True, True, False])
    got = guidance_weights(advantage, kept, GRPO(adv_clip=5.0), 0.4)
    torch.testing.assert_close(got, torch.tensor([1.2, 0.8, 3.0, 0.0, 1.0]))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="kind must be 'flow' or 'x0', got 'eps'"):
        rollout(Denoiser(1), options("dance"), kind="eps")


def test_trajectory_of_a_plain_sampler():
    """The deterministic last step is the student's own: one that starts at the last grid point is the sampler."""
    network = Denoiser(1)
    numbers = GRPO(sde="cps", eta=1.0)
    trajectory = rollout(network, numbers, steps=2)
    assert isinstance(trajectory, Trajectory)
    # eta 1 forgets the noise that x_hat had: x_1 = (1 - t) x0_hat + t n is the student's renoised rollout.
    noises = [NOISE, ops.normal_noise(NOISE, seeds(0), offset=5)]
    expected = sample(network, lambda i: noises[i], Y, timestep_grid(2))
    torch.testing.assert_close(trajectory.x[-1], expected)
