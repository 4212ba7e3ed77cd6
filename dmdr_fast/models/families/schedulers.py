"""The student's timesteps inside the config of one of diffusers' own schedulers.

A pipeline calls ``set_timesteps`` its own way: SD3's with the number of steps, which the scheduler spreads evenly from
sigma = 1 down to 0.001; FLUX.1's, FLUX.2's, Qwen-Image's and Z-Image's with sigmas 1 - i/N and a shift exp(mu) for the
image's size; SDXL's with the number of steps. What is saved here makes of that exactly the student's grid at
``num_inference_steps=N``, and its steps are the student's rollout: x0, then noise as its sampler has it.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

from dmdr_fast.models.families.base import Family

TRAIN_STEPS = 1000


def student_scheduler(family: Family, grid: tuple[float, ...], eta: float = 1.0) -> Any:
    """A scheduler whose own config makes the pipeline of ``family`` sample on ``grid`` = (1, ..., t_{N-1}, 0).

    Flow matching: ``RenoiseScheduler`` with the ``eta`` of :func:`dmdr_fast.algorithm.rollout.next_input`; diffusers'
    FlowMatchEulerDiscreteScheduler for one step, and for eta 0, whose steps are its own (with fresh noise it would draw
    from the global random state). Eps (SDXL): LCMScheduler, whose boundary terms timestep_scaling drives to zero. Other
    grids than shift_time(1 - i/N) are the times of a ``RenoiseScheduler``, and of SDXL the pipeline's own argument
    ``timesteps``.

    Raises:
        ValueError: times that do not fall from at most 1 to 0, or eta other than 1 for SDXL.
    """
    if len(grid) < 2 or grid[0] > 1.0 or grid[-1] != 0.0 or any(a <= b for a, b in pairwise(grid)):
        raise ValueError(f"student grid: expected 1 >= t_0 > ... > t_N = 0, got {_shown(grid)}")
    if family.prediction == "eps":
        if eta != 1.0:
            raise ValueError(f"student sampler: SDXL's pipeline draws fresh noise, expected eta 1, got {eta:g}")
        return _lcm(family)
    return _flow(grid, eta, family.passes_sigmas)


def grid_shift(grid: tuple[float, ...]) -> float | None:
    """The shift s of a grid t_i = s u / (1 + (s - 1) u), u = 1 - i/N; 1 for one step. None where there is none."""
    steps = len(grid) - 1
    if grid[0] != 1.0:
        return None
    if steps == 1:
        return 1.0
    first, u = grid[1], 1.0 - 1.0 / steps
    shift = first * (1.0 - u) / (u * (1.0 - first))
    even = [1.0 - i / steps for i in range(steps + 1)]
    if any(abs(t - shift * e / (1.0 + (shift - 1.0) * e)) > 1e-6 for t, e in zip(grid, even, strict=True)):
        return None
    return 1.0 if abs(shift - 1.0) < 1e-9 else shift


def _flow(grid: tuple[float, ...], eta: float, passes_sigmas: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from dmdr_fast.models.families.renoise_scheduler import RenoiseScheduler

    steps, shift = len(grid) - 1, grid_shift(grid)
    settings: dict[str, Any] = {"num_train_timesteps": TRAIN_STEPS, "stochastic_sampling": eta > 0.0}
    if shift is None:
        return RenoiseScheduler(times=list(grid[:-1]), eta=eta, **settings)
    if steps == 1:
        return FlowMatchEulerDiscreteScheduler(shift=shift, **settings)
    scheduler: Any = FlowMatchEulerDiscreteScheduler if eta == 0.0 else partial(RenoiseScheduler, eta=eta)
    if passes_sigmas:
        return scheduler(shift=shift, **settings)
    # The scheduler spreads z from 1 to 1/1000, shifts by s' and stretches the last to shift_terminal. Both that and
    # the grid are 1 - c u / (1 - k u) in u = i/(N-1), equal where k = (s-1)/s (N-1)/N = (s'-1)/s' (1 - 1/1000).
    k = (shift - 1.0) / shift * (steps - 1.0) / steps
    mu = -math.log(1.0 - k / (1.0 - 1.0 / TRAIN_STEPS))
    return scheduler(use_dynamic_shifting=True, base_shift=mu, max_shift=mu, shift_terminal=grid[-2], **settings)


def _lcm(family: Family) -> Any:
    from diffusers import LCMScheduler

    config = family.scheduler_config
    kept = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
    return LCMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        original_inference_steps=TRAIN_STEPS,
        timestep_scaling=1e6,
        clip_sample=False,
        **{name: config[name] for name in kept if name in config},
    )


def _shown(grid: tuple[float, ...]) -> str:
    return ", ".join(f"{t:.6g}" for t in grid)
