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
    windows = cdiv(offset % block + count, block)
    launch(
        normal_noise_kernel, (windows,), seed.contiguous(), noise, count, offset,
        BLOCK=block, GROUP=group_of(dtype), num_warps=warps,
    )  # fmt: skip
    return noise


def renoise_fwd(
    x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int
) -> Tensor:
    """See :func:`dmdr_fast.reference.renoise_fwd`."""
    out = x0.new_empty(x0.shape)
    alpha, sigma = alpha.contiguous(), sigma.contiguous()
    view = samples(x0, noise)
    x0, noise = view.tensors
    if noise is not None:
        block, warps = block_and_warps(view.count, 8, 2048)
        launch(
            renoise_kernel, (view.batch, cdiv(view.count, block)), x0, noise, alpha, sigma, out,
            view.count, view.inner, view.outer, *view.strides, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return out
    block, warps = seeded_block(view.count)
    launch(
        seeded_renoise_kernel, (view.batch, windows(view.count, offset, block)), x0, seed.contiguous(),
        alpha, sigma, out, view.count, offset, view.inner, view.outer, view.strides[0],
        BLOCK=block, GROUP=group_of(x0.dtype), num_warps=warps,
    )  # fmt: skip
    return out


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


def renoise_bwd(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`dmdr_fast.reference.renoise_bwd`."""
    out = grad.new_empty(grad.shape, dtype=dtype)
    view = samples(grad)
    block, warps = block_and_warps(view.count, 8, 2048)
    launch(
        scaled_kernel, (view.batch, cdiv(view.count, block)), view.tensors[0], scale.contiguous(), out,
        view.count, view.inner, view.outer, *view.strides, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def renoise_scale_bwd(grad: Tensor, factor: Tensor) -> Tensor:
    """See :func:`dmdr_fast.reference.renoise_scale_bwd`."""
    view = samples(grad, factor)
    block, warps = block_and_warps(view.count, 16, 4096)
    blocks = cdiv(view.count, block)
    parts = torch.empty((view.batch, blocks), dtype=torch.float32, device=grad.device)
    launch(
        product_sums_kernel, (view.batch, blocks), *view.tensors, parts, view.count, view.inner, view.outer,
        *view.strides, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return sum_rows(parts, torch.float32)
