"""Launching kernels, and latents as the kernels see them."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dmdr_fast.backends.triton import checkout  # noqa: F401  before anything of dmdr_fast.kernels
from dmdr_fast.backends.views import shared_view
from dmdr_fast.kernels.elements import Shape, View

# The kernels run in Triton's interpreter, on CPU tensors: for tests. Triton reads this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """``kernel`` on the current stream.

    The compiler must not fuse multiplications and additions by itself: the kernels say where, so the bits are the same
    under every version of Triton (its default differs) and in every specialisation of a kernel.
    """
    kernel[grid](*args, **constants, num_warps=num_warps, enable_fp_fusion=False)


class Samples(NamedTuple):
    """Tensors of one shape [B, ...] as samples.

    Attributes:
        batch: number of samples.
        shape: their shape for the kernel.
        views: the tensors for the kernel; None for an absent one. Those whose rows are not contiguous are copies.
    """

    batch: int
    shape: Shape
    views: tuple[View | None, ...]


def samples(*tensors: Tensor | None) -> Samples:
    """The tensors as samples; the first is present and not empty."""
    sizes, fields, held = shared_view(*tensors)
    kept = [dim for dim in range(1, len(sizes) - 1) if sizes[dim] != 1]
    outer = tuple(sizes[dim] for dim in kept)
    strides = [tuple(field[2:][dim] for dim in (0, *kept)) for field in fields]
    reach = max(sum((size - 1) * step for size, step in zip(outer, steps[1:], strict=True)) for steps in strides)
    if reach + sizes[-1] >= 2**31:  # the kernels index within a sample in 32 bits
        return samples(*(tensor if tensor is None else tensor.contiguous() for tensor in tensors))
    views = (None if tensor is None else View(tensor, steps) for tensor, steps in zip(held, strides, strict=True))
    return Samples(sizes[0], Shape(held[0].numel() // sizes[0], sizes[-1], outer), tuple(views))


def block_and_warps(count: int, per_thread: int, most: int) -> tuple[int, int]:
    """(block size, warps) for ``count`` elements at ``per_thread`` elements a thread, at most ``most`` a block."""
    block = min(most, max(128, next_power_of_2(count)))
    return block, max(1, min(32, block // (32 * per_thread)))


def group_of(dtype: torch.dtype) -> int:
    """Consecutive normals in one thread: what a 16-byte access of the dtype holds."""
    return 4 if dtype is torch.float32 else 8
