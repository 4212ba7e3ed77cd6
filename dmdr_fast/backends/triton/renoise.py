"""Renoising and seeded noise on the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import block_and_warps, cdiv, group_of, launch, samples
from dmdr_fast.backends.triton.sums import sum_rows
from dmdr_fast.kernels.renoise import (
    normal_noise_kernel,
    product_sums_kernel,
    renoise_kernel,
    scaled_kernel,
    seeded_renoise_kernel,
)


def normal_noise_fwd(size: list[int], seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """See :func:`dmdr_fast.reference.normal_noise_fwd`; agrees with it to 1e-6."""
    noise = seed.new_empty(size, dtype=dtype)
    count = math.prod(size)
    block, warps = seeded_block(count)
    launch(
        normal_noise_kernel, (cdiv(offset % block + count, block),), seed.contiguous(), noise, count, offset,
        BLOCK=block, GROUP=group_of(dtype), num_warps=warps,
    )  # fmt: skip
    return noise


def renoise_fwd(
    x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int
) -> Tensor:
    """See :func:`dmdr_fast.reference.renoise_fwd`."""
    out = x0.new_empty(x0.shape)
    alpha, sigma = alpha.contiguous(), sigma.contiguous()
    batch, shape, views = samples(x0, noise)
    if noise is not None:
        block, warps = block_and_warps(shape.count, 8, 2048)
        grid = batch, cdiv(shape.count, block)
        launch(renoise_kernel, grid, *views, alpha, sigma, out, shape, BLOCK=block, num_warps=warps)
        return out
    block, warps = seeded_block(shape.count)
    launch(
        seeded_renoise_kernel, (batch, windows(shape.count, offset, block)), views[0], seed.contiguous(),
        alpha, sigma, out, shape, offset, BLOCK=block, GROUP=group_of(x0.dtype), num_warps=warps,
    )  # fmt: skip
    return out


def renoise_bwd(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`dmdr_fast.reference.renoise_bwd`."""
    out = grad.new_empty(grad.shape, dtype=dtype)
    batch, shape, (view,) = samples(grad)
    block, warps = block_and_warps(shape.count, 8, 2048)
    grid = batch, cdiv(shape.count, block)
    launch(scaled_kernel, grid, view, scale.contiguous(), out, shape, BLOCK=block, num_warps=warps)
    return out


def renoise_scale_bwd(grad: Tensor, factor: Tensor) -> Tensor:
    """See :func:`dmdr_fast.reference.renoise_scale_bwd`."""
    batch, shape, views = samples(grad, factor)
    block, warps = block_and_warps(shape.count, 16, 4096)
    parts = grad.new_empty((batch, cdiv(shape.count, block)), dtype=torch.float32)
    launch(product_sums_kernel, tuple(parts.shape), *views, parts, shape, BLOCK=block, num_warps=warps)
    return sum_rows(parts, torch.float32)


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
