"""Renoising and seeded noise on the Triton kernels."""

from __future__ import annotations

import math

import torch

from dmdr_fast.backends.triton.launch import (
    Launches,
    block_and_warps,
    cdiv,
    group_of,
    implements,
    samples,
    tiles,
    too_large,
)
from dmdr_fast.backends.triton.sums import sum_rows
from dmdr_fast.kernels.renoise import (
    normal_noise_kernel,
    product_sums_kernel,
    renoise_kernel,
    scaled_kernel,
    seeded_renoise_kernel,
)


@implements("normal_noise_fwd")
def normal_noise_fwd(run: Launches, a, out) -> None:
    count = math.prod(a.size)
    block, warps = seeded_block(count)
    run.launch(
        normal_noise_kernel, (cdiv(a.offset % block + count, block),), a.seed.contiguous(), *out, count, a.offset,
        BLOCK=block, GROUP=group_of(a.dtype), num_warps=warps,
    )  # fmt: skip


@implements("renoise_fwd", refuses=too_large("x0"))
def renoise_fwd(run: Launches, a, out) -> None:
    alpha, sigma, view = a.alpha.contiguous(), a.sigma.contiguous(), samples(a.x0, a.noise)
    if a.noise is not None:
        grid, tile = tiles(view)
        run.launch(renoise_kernel, grid, *view.views, alpha, sigma, *out, view.shape, **tile)
        return
    block, warps = seeded_block(view.shape.count)
    run.launch(
        seeded_renoise_kernel, (view.batch, windows(view.shape.count, a.offset, block)), view.views[0],
        a.seed.contiguous(), alpha, sigma, *out, view.shape, a.offset, BLOCK=block, GROUP=group_of(a.x0.dtype),
        num_warps=warps,
    )  # fmt: skip


@implements("renoise_bwd", refuses=too_large("grad"))
def renoise_bwd(run: Launches, a, out) -> None:
    view = samples(a.grad)
    grid, tile = tiles(view)
    run.launch(scaled_kernel, grid, *view.views, a.scale.contiguous(), *out, view.shape, **tile)


@implements("renoise_scale_bwd", refuses=too_large("grad"))
def renoise_scale_bwd(run: Launches, a, out) -> None:
    view = samples(a.grad, a.factor)
    grid, tile = tiles(view, 16, 4096)
    parts = run.new(grid, torch.float32)
    run.launch(product_sums_kernel, grid, *view.views, parts, view.shape, **tile)
    sum_rows(run, parts, out.sample_sum)


def seeded_block(count: int) -> tuple[int, int]:
    """(block size, warps) of a kernel that draws noise.

    32 elements a thread: seed, key schedule and addresses cost 90 instructions a thread, 3 an element.
    """
    return block_and_warps(count, 32, 4096)


def windows(count: int, offset: int, block: int) -> int:
    """How many aligned windows of ``block`` elements a sample of ``count`` may touch."""
    if count % block == 0 and offset % block == 0:
        return count // block
    return cdiv(count - 1, block) + 1
