"""SDE steps with their log-probabilities on the Triton kernels."""

from __future__ import annotations

import math

import torch

from dmdr_fast.backends.triton.launch import Launches, implements, samples, seeded_tiles, tiles, too_large
from dmdr_fast.kernels.sde_step import sde_draw_kernel, sde_logprob_kernel, sde_square_kernel, sde_step_bwd_kernel


@implements("sde_step_fwd", refuses=too_large("x"))
def sde_step_fwd(run: Launches, a, out) -> None:
    sigma, sigma_next = a.sigma.contiguous(), a.sigma_next.contiguous()
    if a.next_sample is None:
        view = samples(a.x, a.v)
        grid, tile = seeded_tiles(view.batch, view.shape.count, a.offset, a.x.dtype)
        run.launch(
            sde_draw_kernel, grid, *view.views, sigma, sigma_next, a.seed.contiguous(), out.drawn, view.shape, a.offset,
            *_angles(a.eta), KIND=a.kind, **tile,
        )  # fmt: skip
    view = samples(a.x, a.v, out.drawn if a.next_sample is None else a.next_sample)
    grid, tile = tiles(view)
    parts = run.new(grid, torch.float64)
    run.launch(
        sde_square_kernel, grid, *view.views, sigma, sigma_next, out.mean, parts, view.shape, *_angles(a.eta),
        KIND=a.kind, **tile,
    )  # fmt: skip
    run.launch(
        sde_logprob_kernel, grid[:1], parts, sigma, sigma_next, out.logprob, out.std, grid[1], view.shape.count,
        *_angles(a.eta), KIND=a.kind, BLOCK=256,
    )  # fmt: skip


@implements("sde_step_bwd", refuses=too_large("x"))
def sde_step_bwd(run: Launches, a, out) -> None:
    view = samples(a.x, a.v, a.next_sample, a.grad_next, a.grad_mean)
    (*step, grad_next, grad_mean), (grid, tile) = view.views, tiles(view)
    grad_logprob = None if a.grad_logprob is None else a.grad_logprob.contiguous()
    run.launch(
        sde_step_bwd_kernel, grid, grad_next, grad_logprob, grad_mean, *step, a.sigma.contiguous(),
        a.sigma_next.contiguous(), *out, view.shape, float(view.shape.count), *_angles(a.eta), KIND=a.kind, **tile,
    )  # fmt: skip


def _angles(eta: float) -> tuple[float, float, float]:
    """eta and what the "cps" coefficients make of it."""
    return float(eta), math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
