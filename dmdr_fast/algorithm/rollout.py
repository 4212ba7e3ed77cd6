"""Truncated backward simulation: the generator's own few-step sampling, run only as far as it is needed.

The full N-step rollout is x_{t_0} = z, x0_i = x_{t_i} - t_i v_G(x_{t_i}, t_i), x_{t_{i+1}} = (1 - t_{i+1}) x0_i +
t_{i+1} eps_i. An update trains the generator at one grid point, drawn once per update and the same on every rank, so
the steps beyond it are never run: (N + 1) / 2 forwards in expectation in place of N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmdr_fast import ops
from dmdr_fast.algorithm.schedules import timestep_grid

Network = Callable[[Tensor, Tensor, Any], Tensor]  # (x_t [B, ...], t fp32 [B], condition) -> prediction, x_t's shape
Noise = Callable[[int], Tensor]  # the i-th noise of this rollout, latent shape


@dataclass(frozen=True)
class Rollout:
    """One truncated rollout: the generator's input at the stop step and what it made of it, both without grad."""

    x_in: Tensor  # [B, ...] input of the graded forward
    t_in: Tensor  # fp32 [B] its time
    x0: Tensor  # [B, ...] the generator's sample at the stop step
    reuse: bool  # x0 is the generator's output at (x_in, t_in): the generator update need not run it again


def draw_stop_step(rng: np.random.Generator, steps: int) -> int:
    """The stop step, uniform on 0..steps-1."""
    return int(rng.integers(steps))


def clean_sample(x_t: Tensor, t: Tensor, prediction: Tensor, kind: str = "flow") -> Tensor:
    """The generator's sample x0_hat: ``flow`` x_t - t v, ``x0`` the prediction itself.

    x_t [B, ...], t fp32 [B], prediction like x_t -> x_t's shape and dtype. (An eps prediction has no x0_hat at t = 1,
    where the student starts.)
    """
    if kind == "flow":
        return x_t - t.to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1)) * prediction
    if kind == "x0":
        return prediction
    raise ValueError(f"clean_sample: kind must be 'flow' or 'x0' on a flow-matching path, got {kind!r}")


@torch.no_grad()
def truncated_rollout(
    generator: Network,
    noise: Noise,
    condition: Any,
    grid: tuple[float, ...],
    stop: int,
    *,
    variant: str = "backward_simulation",
    kind: str = "flow",
) -> Rollout:
    """Run the generator from pure noise up to grid step ``stop``.

    ``backward_simulation``: x_in is x_{t_stop} of the full rollout (its law exactly), x0 the sample made from it.
    ``same_step`` (the DMDR reference's): x0_stop is renoised to its own time t_stop and the generator is trained
    there; the fake score still sees x0_stop. It costs one more forward, since x0 is not the graded output.

    ``grid`` is t_0 .. t_N; ``noise(i)`` returns the i-th independent noise of this rollout.
    """
    x = noise(0)
    for i in range(stop + 1):
        t = torch.full((x.shape[0],), grid[i], device=x.device)
        x0 = clean_sample(x, t, generator(x, t, condition), kind)
        if i < stop:
            x = renoised(x0, grid[i + 1], noise(i + 1))
    if variant == "backward_simulation":
        return Rollout(x, t, x0, reuse=True)
    if variant == "same_step":
        return Rollout(renoised(x0, grid[stop], noise(stop + 1)), t, x0, reuse=False)
    raise ValueError(f"rollout variant: expected backward_simulation or same_step, got {variant!r}")


def renoised(x0: Tensor, t: float, noise: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise at one time for the whole batch."""
    sigma = torch.full((x0.shape[0],), t, device=x0.device)
    return ops.renoise(x0, 1.0 - sigma, sigma, noise=noise)


@torch.no_grad()
def sample(generator: Network, noise: Noise, condition: Any, grid: tuple[float, ...], *, kind: str = "flow") -> Tensor:
    """The full N-step rollout: what the trained generator is used as."""
    return truncated_rollout(generator, noise, condition, grid, len(grid) - 2, kind=kind).x0


@torch.no_grad()
def euler_sample(network: Network, x: Tensor, condition: Any, steps: int, *, shift: float = 1.0) -> Tensor:
    """Euler integration of dx/dt = v(x, t) from t = 1 to 0 on a shifted uniform grid: the multi-step teacher."""
    grid = timestep_grid(steps, shift=shift)
    for t, t_next in pairwise(grid):
        x = x + (t_next - t) * network(x, torch.full((x.shape[0],), t, device=x.device), condition)
    return x
