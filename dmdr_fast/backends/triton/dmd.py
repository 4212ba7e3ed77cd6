"""The DMD gradient on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import (
    Launches,
    Samples,
    block_and_warps,
    cdiv,
    implements,
    next_power_of_2,
    samples,
    too_large,
)
from dmdr_fast.kernels.dmd_gradient import (
    Latents,
    Options,
    Scalars,
    dmd_distance_kernel,
    dmd_gradient_kernel,
    dmd_gradient_sample_kernel,
    dmd_loss_bwd_kernel,
    dmd_loss_kernel,
    dmd_norm_kernel,
    dmd_zero_samples_kernel,
)

# What 512 threads hold: 32 elements each. 1024 threads of 32 spill.
_LARGEST_BLOCK = 16384
_MOST_PARTS = 256


@implements("dmd_gradient_fwd", refuses=too_large("x0"))
def dmd_gradient_fwd(run: Launches, a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out_dtype = a.out_dtype or a.x0.dtype
    grad = run.new(a.x0.shape, out_dtype)
    mask = None if a.mask is None else run.part(a.mask.expand(a.x0.shape), a.mask)
    view = samples(a.x0, a.x_t, a.pred_fake, a.pred_real, a.pred_real_uncond, mask)
    per_sample = (None if s is None else s.contiguous() for s in (a.sigma, a.alpha, a.cfg_tensor, a.weight))
    written = 1.0
    if a.scaled:
        written = 2 * a.factor / max(a.x0.numel(), 1) if a.reduction == "mean" else 2 * a.factor
    scalars = Scalars(*per_sample, float(a.cfg_scale), float(a.eps), float(written))
    options = Options(
        a.prediction, a.cfg_mode, a.normalizer, a.eps_mode, a.nan_policy, torch.finfo(out_dtype).max
    )  # fmt: skip
    fits = a.normalizer != "global" and view.shape.count <= _LARGEST_BLOCK
    if a.normalizer == "none" and not fits:  # the second reading does not write them
        norms = run.filled(a.x0.shape[:1], 1, torch.float32)
    else:
        norms = run.new(a.x0.shape[:1], torch.float32)
    squares, counts = (_one_reading if fits else _two_readings)(
        run, view, scalars, grad, norms, mask is not None, options
    )

    loss, loss_scale = (run.new((), torch.float32) for _ in range(2))
    run.launch(
        dmd_loss_kernel, (1,), squares, counts, loss, loss_scale, squares.numel(), float(a.x0.numel()),
        float(a.factor), MEAN=a.reduction == "mean", SCALED=a.scaled, BLOCK=1024,
    )  # fmt: skip
    return grad, norms, loss, loss_scale


def _one_reading(
    run: Launches, view: Samples, scalars: Scalars, grad: Tensor, norms: Tensor, masked: bool, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Write grad and norms; returns the sums of squares, and the counts where there is a mask."""
    squares = run.new(norms.shape, torch.float32)
    counts = run.new(norms.shape, torch.int32) if masked else None
    count = view.shape.count
    block, warps = block_and_warps(count, 16 if count <= 4096 else 32, _LARGEST_BLOCK)
    run.launch(
        dmd_gradient_sample_kernel, (view.batch,), Latents(*view.views), scalars, grad, norms, squares, counts,
        view.shape, OPTIONS=options, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return squares, counts


def _two_readings(
    run: Launches, view: Samples, scalars: Scalars, grad: Tensor, norms: Tensor, masked: bool, options: Options
) -> tuple[Tensor, Tensor | None]:
    """As ``_one_reading``, for samples beyond a block and for the normaliser over all samples."""
    batch, shape, latents = view.batch, view.shape, Latents(*view.views)
    block, warps = block_and_warps(shape.count, 16, 2048)
    parts = min(cdiv(shape.count, block), _MOST_PARTS)
    squares, distances = (run.new((batch, parts), torch.float32) for _ in range(2))
    counts, broken = (run.new((batch, parts), torch.int32) for _ in range(2))
    constants = {"OPTIONS": options, "BLOCK": block, "num_warps": warps}
    if options.normalizer != "none":
        run.launch(dmd_distance_kernel, (batch, parts), latents, scalars, distances, counts, shape, **constants)
        programs = batch if options.normalizer == "per_sample" else 1
        run.launch(
            dmd_norm_kernel, (programs,), distances, counts, norms, batch // programs, batch * parts // programs,
            scalars.eps, OPTIONS=options, BLOCK=256,
        )  # fmt: skip
    run.launch(
        dmd_gradient_kernel, (batch, parts), latents, scalars, grad, norms, squares, counts, broken, shape,
        **constants,
    )  # fmt: skip
    if options.nan_policy == "zero_sample":
        run.launch(
            dmd_zero_samples_kernel, (batch, parts), grad, squares, broken, shape, PARTS=next_power_of_2(parts),
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return squares, counts if masked else None


@implements("dmd_loss_bwd", refuses=too_large("g"))
def dmd_loss_bwd(run: Launches, a) -> Tensor:
    out = run.new(a.g.shape, a.dtype)
    batch, shape, (view,) = samples(a.g)
    block, warps = block_and_warps(shape.count, 8, 2048)
    grid = batch, cdiv(shape.count, block)
    run.launch(dmd_loss_bwd_kernel, grid, a.grad_loss, view, a.loss_scale, out, shape, BLOCK=block, num_warps=warps)
    return out
