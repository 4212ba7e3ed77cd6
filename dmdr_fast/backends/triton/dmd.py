"""The DMD gradient on the Triton kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dmdr_fast.backends.triton.counters import counters
from dmdr_fast.backends.triton.launch import Launches, Samples, block_and_warps, implements, samples, tiles, too_large
from dmdr_fast.kernels.dmd_gradient import (
    Latents,
    Options,
    Parts,
    Scalars,
    Totals,
    dmd_distance_kernel,
    dmd_gradient_kernel,
    dmd_gradient_sample_kernel,
    dmd_loss_bwd_kernel,
)

# What 512 threads hold: 32 elements each. 1024 threads of 32 spill.
_LARGEST_BLOCK = 16384
_MOST_PARTS = 256


@implements("dmd_gradient_fwd", refuses=too_large("x0"))
def dmd_gradient_fwd(run: Launches, a, out) -> None:
    mask = None if a.mask is None else run.part(a.mask.expand(a.x0.shape), a.mask)
    view = samples(a.x0, a.x_t, a.pred_fake, a.pred_real, a.pred_real_uncond, mask)
    per_sample = (None if s is None else s.contiguous() for s in (a.sigma, a.alpha, a.cfg_tensor, a.weight))
    written = 1.0
    if a.scaled:
        written = 2 * a.factor / max(a.x0.numel(), 1) if a.reduction == "mean" else 2 * a.factor
    scalars = Scalars(*per_sample, float(a.cfg_scale), float(a.eps), float(written))
    largest = torch.finfo(out.grad.dtype).max
    options = Options(a.prediction, a.cfg_mode, a.normalizer, a.eps_mode, a.nan_policy, a.reduction, a.scaled, largest)
    arrived = run.allocate(functools.partial(counters, 1 + a.x0.shape[0], run.device))
    totals = Totals(out.norm, out.loss, out.loss_scale, arrived, float(a.x0.numel()), float(a.factor))
    fits = a.normalizer != "global" and view.shape.count <= _LARGEST_BLOCK
    (_one_reading if fits else _two_readings)(run, view, scalars, out.grad, totals, options)


def _one_reading(
    run: Launches, view: Samples, scalars: Scalars, grad: Tensor, totals: Totals, options: Options
) -> None:
    """Write grad and the totals."""
    latents, norms = Latents(*view.views), totals.norms
    counts = None if latents.mask is None else run.new(norms.shape, torch.int32)
    count = view.shape.count
    block, warps = block_and_warps(count, 16 if count <= 4096 else 32, _LARGEST_BLOCK)
    run.launch(
        dmd_gradient_sample_kernel, (view.batch,), latents, scalars, grad,
        Parts(run.new(norms.shape, torch.float32), None, counts, None), totals, view.shape, OPTIONS=options,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _two_readings(
    run: Launches, view: Samples, scalars: Scalars, grad: Tensor, totals: Totals, options: Options
) -> None:
    """As ``_one_reading``, for samples beyond a block and for the normaliser over all samples."""
    (batch, blocks), tile = tiles(view, 16)
    grid, latents = (batch, min(blocks, _MOST_PARTS)), Latents(*view.views)
    squares, distances = (run.new(grid, torch.float32) for _ in range(2))
    counts, broken = (run.new(grid, torch.int32) for _ in range(2))
    parts = Parts(squares, distances, counts, broken)
    if options.normalizer != "none":
        run.launch(dmd_distance_kernel, grid, latents, scalars, parts, totals, view.shape, OPTIONS=options, **tile)
    run.launch(dmd_gradient_kernel, grid, latents, scalars, grad, parts, totals, view.shape, OPTIONS=options, **tile)


@implements("dmd_loss_bwd", refuses=too_large("g"))
def dmd_loss_bwd(run: Launches, a, out) -> None:
    view = samples(a.g)
    grid, tile = tiles(view)
    run.launch(dmd_loss_bwd_kernel, grid, a.grad_loss, *view.views, a.loss_scale, out.grad_x0, view.shape, **tile)
