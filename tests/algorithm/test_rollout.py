"""Truncated rollout: the same law and numbers as the full one, at the cost of the steps that are used."""

import itertools

import numpy as np
import pytest
import torch

from dmdr_fast.algorithm.rollout import expected_forwards, next_input, ode_sample, renoised, sample, truncated_rollout
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.algorithm.streams import Streams

from .networks import SHAPE, Denoiser

LABELS = torch.tensor([0, 2, 1])


def noises(i):
    rng = torch.Generator().manual_seed(100 + i)
    return torch.randn(3, *SHAPE, generator=rng, dtype=torch.float64)


def full_rollout(network, grid):
    """Independent: every x_{t_i} and x0_i of the whole rollout, by the formulas."""
    x, inputs, outputs = noises(0), [], []
    for i, t in enumerate(grid[:-1]):
        x0 = x - t * network(x, torch.full((3,), t, dtype=torch.float64), LABELS)
        inputs.append(x)
        outputs.append(x0)
        if i + 1 < len(grid) - 1:
            x = (1 - grid[i + 1]) * x0 + grid[i + 1] * noises(i + 1)
    return inputs, outputs


@pytest.mark.parametrize("stop", range(4))
def test_input_of_the_graded_step_is_that_of_the_full_rollout(stop):
    network, grid = Denoiser(0), timestep_grid(4, shift=2.0)
    inputs, outputs = full_rollout(network, grid)
    calls = []
    rollout = truncated_rollout(lambda x, t, y: calls.append(t) or network(x, t, y), noises, LABELS, grid, stop)
    torch.testing.assert_close(rollout.x_in, inputs[stop], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rollout.x0, outputs[stop], rtol=1e-6, atol=1e-6)
    assert rollout.reuse and len(calls) == stop + 1
    assert torch.equal(rollout.t_in, torch.full((3,), grid[stop]))


@pytest.mark.parametrize("stop", range(3))
def test_same_step_variant_renoises_to_the_step_s_own_time(stop):
    network, grid = Denoiser(0), timestep_grid(3)
    _, outputs = full_rollout(network, grid)
    rollout = truncated_rollout(network, noises, LABELS, grid, stop, variant="same_step")
    expected = (1 - grid[stop]) * outputs[stop] + grid[stop] * noises(stop + 1)
    torch.testing.assert_close(rollout.x_in, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rollout.x0, outputs[stop], rtol=1e-6, atol=1e-6)
    assert not rollout.reuse


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_samplers_by_the_formula(eta):
    """In fp64: x' = (1 - t') x0 + t' (cos n_hat + sin n), n_hat = (x - (1 - t) x0) / t; Euler's step at eta 0."""
    network, grid, drawn = Denoiser(0), timestep_grid(4, shift=2.0), []
    rollout = truncated_rollout(network, lambda i: drawn.append(i) or noises(i), LABELS, grid, 3, eta=eta)
    x = noises(0)
    for i, (t, later) in enumerate(itertools.pairwise(grid)):
        v = network(x, torch.full((3,), t, dtype=torch.float64), LABELS)
        if i == 3:
            break
        x0 = x - t * v
        n = np.cos(eta * np.pi / 2) * (x - (1 - t) * x0) / t + np.sin(eta * np.pi / 2) * noises(i + 1)
        x = x + (later - t) * v if eta == 0.0 else (1 - later) * x0 + later * n
    torch.testing.assert_close(rollout.x_in, x, rtol=1e-6, atol=1e-6)  # sigmas are fp32
    torch.testing.assert_close(rollout.x0, x - grid[3] * v, rtol=1e-6, atol=1e-6)
    assert drawn == ([0] if eta == 0.0 else [0, 1, 2, 3])


def test_next_input_to_fp64_rounding_and_the_law_it_keeps():
    """On times that fp32 has. cps keeps the noise's variance: cos^2 + sin^2 = 1."""
    x0, old, new = (noises(i) for i in range(3))
    t, later, eta = 0.75, 0.25, 0.4
    x = (1 - t) * x0 + t * old
    found = next_input(x, x0, t, later, lambda: new, eta)
    angle = eta * np.pi / 2
    expected = (1 - later) * x0 + later * (np.cos(angle) * old + np.sin(angle) * new)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    v = (x - x0) / t
    torch.testing.assert_close(
        next_input(x, x0, t, later, lambda: new, 0.0), x + (later - t) * v, rtol=1e-13, atol=1e-13
    )
    assert torch.equal(next_input(x, x0, t, later, lambda: new), renoised(x0, later, new))


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_one_step_is_the_same_to_the_bit_under_every_sampler(eta):
    network, grid = Denoiser(0), timestep_grid(1)
    assert torch.equal(sample(network, noises, LABELS, grid, eta=eta), sample(network, noises, LABELS, grid))


def test_the_euler_student_of_many_steps_is_the_teacher_s_flow():
    network = Denoiser(0)
    found = sample(network, noises, LABELS, timestep_grid(8, shift=2.0), eta=0.0)
    torch.testing.assert_close(found, ode_sample(network, noises(0), LABELS, 8, shift=2.0), rtol=1e-6, atol=1e-6)


def test_stop_step_is_uniform():
    drawn = [Streams(0).stop_step(4, i) for i in range(4000)]
    counts = np.bincount(drawn, minlength=4)
    assert len(counts) == 4 and abs(counts - 1000).max() < 4 * np.sqrt(4000 * 3 / 16)


def test_expected_forwards_are_the_mean_of_what_is_drawn():
    """(N + 1) / 2 where all ranks stop alike; of the longest of 3 that draw their own 1 + E max, counted out."""
    assert [expected_forwards(n) for n in (1, 2, 4)] == [1.0, 1.5, 2.5]
    longest = [1 + max(stops) for stops in itertools.product(range(4), repeat=3)]
    assert expected_forwards(4, ranks=3) == pytest.approx(np.mean(longest))


def test_sample_is_the_last_x0_of_the_full_rollout():
    network, grid = Denoiser(0), timestep_grid(3)
    torch.testing.assert_close(
        sample(network, noises, LABELS, grid), full_rollout(network, grid)[1][-1], rtol=1e-6, atol=1e-6
    )


def test_euler_converges_to_the_exact_flow():
    """For x0 ~ N(0, s^2) the velocity is linear in x and the flow is x(t) = z sqrt(((1-t)^2 s^2 + t^2) / 1)."""
    s = 0.5

    def velocity(x, t, y):
        t = t.double().view(-1, 1)
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    errors = [(ode_sample(velocity, z, None, n) - s * z).abs().max().item() for n in (50, 100)]
    assert errors[1] < 0.02 and errors[1] == pytest.approx(errors[0] / 2, rel=0.1)
