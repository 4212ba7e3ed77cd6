"""Launching kernels, and latents as the kernels see them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dmdr_fast.backends.views import shared_view

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """``kernel`` on the current stream.

    The compiler must not fuse multiplications and additions by itself: the kernels say where, so the bits are the same
    under every version of Triton (its default differs) and in every specialisation of a kernel.
    """
    kernel[grid](*args, **constants, num_warps=num_warps, enable_fp_fusion=False)


class Samples(NamedTuple):
    """Tensors of one shape [B, ...] as samples of ``count`` elements.

    Attributes:
        batch, count: samples, and elements of each.
        inner, outer: contiguous elements of a row, and sizes of the dimensions between batch and row that do not merge
            with it; () where all tensors are contiguous.
        tensors: as given, or copies of those whose rows are not contiguous. None stays.
        strides: per tensor (batch, *outer), in elements.
    """

    batch: int
    count: int
    inner: int
    outer: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    strides: tuple[tuple[int, ...], ...]


def samples(*tensors: Tensor | None) -> Samples:
    """The tensors as samples; the first is present and not empty."""
    shape, fields, held = shared_view(*tensors)
    kept = [dim for dim in range(1, len(shape) - 1) if shape[dim] != 1]
    strides = tuple(tuple(field[2:][dim] for dim in (0, *kept)) for field in fields)
    count = held[0].numel() // shape[0]
    outer = tuple(shape[dim] for dim in kept)
    spans = [sum((size - 1) * step for size, step in zip(outer, steps[1:], strict=True)) for steps in strides]
    if max(spans) + shape[-1] >= 2**31:  # the kernels index within a sample in 32 bits
        return samples(*(tensor if tensor is None else tensor.contiguous() for tensor in tensors))
    return Samples(shape[0], count, shape[-1], outer, held, strides)


def block_and_warps(count: int, per_thread: int, most: int) -> tuple[int, int]:
    """(block size, warps) for ``count`` elements at ``per_thread`` elements a thread, at most ``most`` a block."""
    block = min(most, max(128, next_power_of_2(count)))
    return block, max(1, min(32, block // (32 * per_thread)))


def group_of(dtype: torch.dtype) -> int:
    """Consecutive normals in one thread: what a 16-byte access of the dtype holds."""
    return 4 if dtype is torch.float32 else 8
