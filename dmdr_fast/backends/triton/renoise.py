"""Renoising and seeded noise on the Triton kernels."""

from __future__ import annotations

import math

import torch

from dmdr_fast.backends.triton.launch import Launches, cdiv, implements, samples, seeded_tiles, tiles, too_large
from dmdr_fast.backends.triton.sums import sum_rows
from dmdr_fast.kernels import renoise as kernels


@implements("normal_noise_fwd")
def normal_noise_fwd(run: Launches, a, out) -> None:
    count = math.prod(a.size)
    _, tile = seeded_tiles(1, count, a.offset, a.dtype)
    grid = (cdiv(a.offset % tile["BLOCK"] + count, tile["BLOCK"]),)
    run.launch(kernels.normal_noise_kernel, grid, a.seed.contiguous(), *out, count, a.offset, **tile)


@implements("renoise_fwd", refuses=too_large("x0"))
def renoise_fwd(run: Launches, a, out) -> None:
    alpha, sigma, view = a.alpha.contiguous(), a.sigma.contiguous(), samples(a.x0, a.noise)
    if a.noise is not None:
        grid, tile = tiles(view)
        run.launch(kernels.renoise_kernel, grid, *view.views, alpha, sigma, *out, view.shape, **tile)
        return
    grid, tile = seeded_tiles(view.batch, view.shape.count, a.offset, a.x0.dtype)
    run.launch(
        kernels.seeded_renoise_kernel, grid, view.views[0], a.seed.contiguous(), alpha, sigma, *out, view.shape,
        a.offset, **tile,
    )  # fmt: skip


@implements("renoise_bwd", refuses=too_large("grad"))
def renoise_bwd(run: Launches, a, out) -> None:
    view = samples(a.grad)
    grid, tile = tiles(view)
    run.launch(kernels.scaled_kernel, grid, *view.views, a.scale.contiguous(), *out, view.shape, **tile)


@implements("renoise_scale_bwd", refuses=too_large("grad"))
def renoise_scale_bwd(run: Launches, a, out) -> None:
    view = samples(a.grad, a.factor)
    grid, tile = tiles(view, 16, 4096)
    parts = run.new(grid, torch.float32)
    run.launch(kernels.product_sums_kernel, grid, *view.views, parts, view.shape, **tile)
    sum_rows(run, parts, out.sample_sum)
