"""Truncated backward simulation: the generator's own few-step sampling, run only as far as it is needed.

The full N-step rollout is x_{t_0} = z, x0_i = x_{t_i} - t_i v_G(x_{t_i}, t_i), x_{t_{i+1}} = (1 - t_{i+1}) x0_i +
t_{i+1} eps_i, where the sampler says what eps_i is, see :func:`next_input`. A micro-batch trains the generator at one
grid point, so the steps beyond it are never run: (N + 1) / 2 forwards in expectation in place of N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from dmdr_fast import ops
from dmdr_fast.algorithm.paths import FLOW, Path, clean_sample
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.ops.dmd import Prediction

Network = Callable[[Tensor, Tensor, Any], Tensor]  # (x_t [B, ...], t fp32 [B], condition) -> prediction, x_t's shape
Variant = Literal["backward_simulation", "same_step"]
Noise = Callable[[int], Tensor]  # the i-th noise of this rollout, latent shape


@dataclass(frozen=True)
class Rollout:
    """One truncated rollout: the generator's input at the stop step and what it made of it, both without grad."""

    x_in: Tensor  # [B, ...] input of the graded forward
    t_in: Tensor  # fp32 [B] its time
    x0: Tensor  # [B, ...] the generator's sample at the stop step
    reuse: bool  # x0 is the generator's output at (x_in, t_in): the generator update need not run it again


def expected_forwards(steps: int, ranks: int = 1) -> float:
    """Forwards of a truncated rollout of N ``steps`` in expectation; of the longest where ``ranks`` draw their own.

    N - sum_{k<N} (k / N)^ranks, so (N + 1) / 2 where all ranks stop alike.
    """
    return steps - sum((k / steps) ** ranks for k in range(1, steps))


@torch.no_grad()
def truncated_rollout(
    generator: Network,
    noise: Noise,
    condition: Any,
    grid: tuple[float, ...],
    stop: int,
    *,
    variant: Variant = "backward_simulation",
    eta: float = 1.0,
    kind: Prediction = "flow",
    path: Path = FLOW,
) -> Rollout:
    """Run the generator from pure noise up to grid step ``stop``.

    ``backward_simulation``: x_in is x_{t_stop} of the full rollout (its law exactly), x0 the sample made from it.
    ``same_step`` (the DMDR reference's): x0_stop is renoised to its own time t_stop and the generator is trained
    there; the fake score still sees x0_stop. It costs one more forward, since x0 is not the graded output.

    ``grid`` is t_0 .. t_N; ``noise(i)`` returns the i-th independent noise of this rollout. ``eta``: how much of a
    step's noise is fresh, see :func:`next_input`; where none is, ``noise`` is asked for noise 0 alone.
    """
    x = noise(0)
    with whole_weights(generator) if stop else nullcontext():
        for i in range(stop + 1):
            t = torch.full((x.shape[0],), grid[i], device=x.device)
            x0 = clean_sample(x, t, generator(x, t, condition), kind, path)
            if i < stop:
                x = next_input(x, x0, grid[i], grid[i + 1], partial(noise, i + 1), eta, path)
    if variant == "backward_simulation":
        return Rollout(x, t, x0, reuse=True)
    if variant == "same_step":
        return Rollout(renoised(x0, grid[stop], noise(stop + 1), path), t, x0, reuse=False)
    raise ValueError(f"rollout variant: expected backward_simulation or same_step, got {variant!r}")


def whole_weights(generator: Network) -> AbstractContextManager:
    """The context that a role whose weights are partitioned over the ranks offers for forwards that follow each other:
    it may gather them once. Nothing for other networks."""
    return getattr(generator, "whole_weights", nullcontext)()


def next_input(
    x: Tensor, x0: Tensor, t: float, t_next: float, fresh: Callable[[], Tensor], eta: float = 1.0, path: Path = FLOW
) -> Tensor:
    """x_{t'} = alpha' x0 + sigma' n', n' = cos(eta pi / 2) n_hat + sin(eta pi / 2) n, n_hat = (x_t - alpha x0) / sigma.

    eta 1 is fresh noise n alone (the sampler ``renoise``); eta 0 the noise n_hat that is in x_t, which on the flow path
    is the Euler step x_t + (t' - t) v (``ode``); between them is coefficients-preserving sampling (``cps``, Flow-CPS,
    arXiv 2509.05952).

    x, x0 [B, ...]; ``fresh()`` draws n, x0's shape, and is called where eta is above 0.
    """
    if eta == 1.0:
        return renoised(x0, t_next, fresh(), path)
    shape = (-1, *[1] * (x.ndim - 1))
    times = torch.full((x.shape[0],), t, device=x.device)
    alpha, sigma = (c.to(x.dtype).view(shape) for c in path.alpha_sigma(times))
    noise = (x - alpha * x0) / sigma
    if eta:
        noise = math.cos(eta * math.pi / 2) * noise + math.sin(eta * math.pi / 2) * fresh()
    return renoised(x0, t_next, noise, path)


def renoised(x0: Tensor, t: float, noise: Tensor, path: Path = FLOW) -> Tensor:
    """x_t = alpha x0 + sigma noise at one time for the whole batch."""
    return ops.renoise(x0, *path.alpha_sigma(torch.full((x0.shape[0],), t, device=x0.device)), noise=noise)


@torch.no_grad()
def sample(
    generator: Network,
    noise: Noise,
    condition: Any,
    grid: tuple[float, ...],
    *,
    eta: float = 1.0,
    kind: Prediction = "flow",
    path: Path = FLOW,
) -> Tensor:
    """The full N-step rollout: what the trained generator is used as."""
    return truncated_rollout(generator, noise, condition, grid, len(grid) - 2, eta=eta, kind=kind, path=path).x0


@torch.no_grad()
def ode_sample(
    network: Network,
    x: Tensor,
    condition: Any,
    steps: int,
    *,
    shift: float = 1.0,
    kind: Prediction = "flow",
    path: Path = FLOW,
) -> Tensor:
    """The multi-step teacher: the probability-flow ODE from t = 1 to 0 on a shifted uniform grid.

    A flow prediction takes Euler steps of dx/dt = v; any other the DDIM step (arXiv 2010.02502), which is the same
    where both exist: x' = alpha' x0_hat + sigma' eps_hat.
    """
    grid = timestep_grid(steps, shift=shift)
    for t, t_next in pairwise(grid):
        times = torch.full((x.shape[0],), t, device=x.device)
        prediction = network(x, times, condition)
        if kind == "flow":
            x = x + (t_next - t) * prediction
            continue
        x0 = clean_sample(x, times, prediction, kind, path)
        if t_next == 0.0:
            return x0
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (c.view(shape) for c in path.alpha_sigma(times))
        alpha_next, sigma_next = (c.view(shape) for c in path.alpha_sigma(torch.full_like(times, t_next)))
        x = alpha_next * x0 + sigma_next * (x - alpha * x0) / sigma
    return x
