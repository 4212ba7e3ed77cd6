"""The DMD gradient on the Triton kernels."""

from __future__ import annotations

import torch

from dmdr_fast.backends.triton.counters import counters
from dmdr_fast.backends.triton.launch import Launches, block_and_warps, implements, samples, tiles, too_large
from dmdr_fast.kernels import dmd_gradient as kernels

# What 512 threads hold: 32 elements each. 1024 threads of 32 spill.
_LARGEST_BLOCK = 16384
_MOST_PARTS = 256


@implements("dmd_gradient_fwd", refuses=too_large("x0"))
def dmd_gradient_fwd(run: Launches, a, out) -> None:
    mask = None if a.mask is None else run.part(a.mask.expand(a.x0.shape), a.mask)
    view, batch = samples(a.x0, a.x_t, a.pred_fake, a.pred_real, a.pred_real_uncond, mask), out.norm.shape
    per_sample = (None if s is None else s.contiguous() for s in (a.sigma, a.alpha, a.cfg_tensor, a.weight))
    count = max(a.x0.numel(), 1) if a.reduction == "mean" else 1
    written = 2 * a.factor / count if a.scaled else 1.0
    scalars = kernels.Scalars(*per_sample, float(a.cfg_scale), float(a.eps), float(written))
    largest = torch.finfo(out.grad.dtype).max
    options = kernels.Options(
        a.prediction, a.cfg_mode, a.normalizer, a.eps_mode, a.nan_policy, a.reduction, a.scaled, largest
    )
    arrived = run.allocate(counters(1 + a.x0.shape[0], run.device))
    totals = kernels.Totals(out.norm, out.loss, out.loss_scale, arrived, float(a.x0.numel()), float(a.factor))
    latents, shape = kernels.Latents(*view.views), view.shape
    if a.normalizer != "global" and shape.count <= _LARGEST_BLOCK:  # a sample is read once
        counts = None if mask is None else run.new(batch, torch.int32)
        parts = kernels.Parts(run.new(batch, torch.float32), None, counts, None)
        block, warps = block_and_warps(shape.count, 16 if shape.count <= 4096 else 32, _LARGEST_BLOCK)
        run.launch(
            kernels.dmd_gradient_sample_kernel, tuple(batch), latents, scalars, out.grad, parts, totals, shape,
            OPTIONS=options, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return
    # Larger samples, and the normaliser over all of them: a sum first, then the gradient.
    (_, blocks), tile = tiles(view, 16)
    grid = *batch, min(blocks, _MOST_PARTS)
    parts = kernels.Parts(*(run.new(grid, dtype) for dtype in (torch.float32, torch.float32, torch.int32, torch.int32)))
    if a.normalizer != "none":
        run.launch(kernels.dmd_distance_kernel, grid, latents, scalars, parts, totals, shape, OPTIONS=options, **tile)
    run.launch(
        kernels.dmd_gradient_kernel, grid, latents, scalars, out.grad, parts, totals, shape, OPTIONS=options, **tile
    )


@implements("dmd_loss_bwd", refuses=too_large("g"))
def dmd_loss_bwd(run: Launches, a, out) -> None:
    view = samples(a.g)
    grid, tile = tiles(view)
    run.launch(
        kernels.dmd_loss_bwd_kernel, grid, a.grad_loss, *view.views, a.loss_scale, out.grad_x0, view.shape, **tile
    )
