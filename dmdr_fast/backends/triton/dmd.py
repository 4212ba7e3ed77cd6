"""The DMD gradient on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.kept import counters
from dmdr_fast.backends.triton.launch import Samples, block_and_warps, cdiv, launch, samples
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


def dmd_gradient_fwd(
    x0: Tensor,
    x_t: Tensor,
    pred_fake: Tensor,
    pred_real: Tensor,
    pred_real_uncond: Tensor | None,
    sigma: Tensor,
    alpha: Tensor | None,
    cfg_tensor: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    cfg_scale: float,
    cfg_mode: str,
    prediction: str,
    normalizer: str,
    eps: float,
    eps_mode: str,
    nan_policy: str,
    out_dtype: torch.dtype,
    reduction: str,
    factor: float,
    scaled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.dmd_gradient_fwd`."""
    grad = x0.new_empty(x0.shape, dtype=out_dtype)
    norms = x0.new_empty(x0.shape[:1], dtype=torch.float32)
    if mask is not None:
        mask = mask.expand(x0.shape)
    view = samples(x0, x_t, pred_fake, pred_real, pred_real_uncond, mask)
    per_sample = (None if scalar is None else scalar.contiguous() for scalar in (sigma, alpha, cfg_tensor, weight))
    written = 1.0
    if scaled:
        written = 2 * factor / max(x0.numel(), 1) if reduction == "mean" else 2 * factor
    scalars = Scalars(*per_sample, cfg_scale, eps, written)
    largest = torch.finfo(out_dtype).max
    options = Options(prediction, cfg_mode, normalizer, eps_mode, nan_policy, reduction, scaled, largest)
    loss, loss_scale = norms.new_empty(()), norms.new_empty(())
    arrived = counters(x0.device, 1 + x0.shape[0])
    totals = Totals(norms, loss, loss_scale, arrived, float(x0.numel()), factor)
    run = _one_reading if normalizer != "global" and view.shape.count <= _LARGEST_BLOCK else _two_readings
    run(view, scalars, grad, totals, options)
    return grad, norms, loss, loss_scale


def _one_reading(view: Samples, scalars: Scalars, grad: Tensor, totals: Totals, options: Options) -> None:
    """Write grad and the totals."""
    latents, norms = Latents(*view.views), totals.norms
    counts = None if latents.mask is None else torch.empty_like(norms, dtype=torch.int32)
    count = view.shape.count
    block, warps = block_and_warps(count, 16 if count <= 4096 else 32, _LARGEST_BLOCK)
    launch(
        dmd_gradient_sample_kernel, (view.batch,), latents, scalars, grad,
        Parts(torch.empty_like(norms), None, counts, None), totals, view.shape, OPTIONS=options, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip


def _two_readings(view: Samples, scalars: Scalars, grad: Tensor, totals: Totals, options: Options) -> None:
    """As ``_one_reading``, for samples beyond a block and for the normaliser over all samples."""
    batch, shape, latents = view.batch, view.shape, Latents(*view.views)
    block, warps = block_and_warps(shape.count, 16, 2048)
    grid = batch, min(cdiv(shape.count, block), _MOST_PARTS)
    squares, distances = grad.new_empty((2, *grid), dtype=torch.float32).unbind()
    counts, broken = grad.new_empty((2, *grid), dtype=torch.int32).unbind()
    parts = Parts(squares, distances, counts, broken)
    constants = {"OPTIONS": options, "BLOCK": block, "num_warps": warps}
    if options.normalizer != "none":
        launch(dmd_distance_kernel, grid, latents, scalars, parts, totals, shape, **constants)
    launch(dmd_gradient_kernel, grid, latents, scalars, grad, parts, totals, shape, **constants)


def dmd_loss_bwd(grad_loss: Tensor, g: Tensor, loss_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`dmdr_fast.reference.dmd_loss_bwd`."""
    out = g.new_empty(g.shape, dtype=dtype)
    batch, shape, (view,) = samples(g)
    block, warps = block_and_warps(shape.count, 8, 2048)
    grid = batch, cdiv(shape.count, block)
    launch(dmd_loss_bwd_kernel, grid, grad_loss, view, loss_scale, out, shape, BLOCK=block, num_warps=warps)
    return out
