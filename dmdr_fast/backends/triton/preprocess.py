"""Image preparation for reward models on the Triton kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dmdr_fast.backends.triton.kept import kept
from dmdr_fast.backends.triton.launch import cdiv, launch, next_power_of_2
from dmdr_fast.kernels.preprocess_reward import (
    Filter,
    filter_kernel,
    resize_columns_bwd_kernel,
    resize_columns_kernel,
    resize_rows_bwd_kernel,
    resize_rows_kernel,
)


class _Filter(NamedTuple):
    """The filter of one dimension, see kernels/preprocess_reward.py.

    Attributes:
        table: its weights, and where the windows start and stop.
        taps: length of the longest window.
        scale: inputs per output.
        reach: half the width of a window in inputs, and one more.
    """

    table: Filter
    taps: int
    scale: float
    reach: float


def preprocess_reward_fwd(
    image: Tensor,
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    antialias: bool,
    low: float,
    high: float,
    need_inside: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.preprocess_reward_fwd`."""
    batch, channels, in_height, in_width = image.shape
    planes = batch * channels
    out = image.new_empty((batch, channels, height, width))
    bits = (batch, channels, in_height, cdiv(in_width, 8)) if need_inside else (0,)
    inside = image.new_empty(bits, dtype=torch.uint8)
    vertical, horizontal = _filters((in_height, in_width), (height, width), antialias, image)

    mid = image.new_empty((planes, height, in_width), dtype=torch.float32)
    block = _columns(in_width, image)
    launch(
        resize_rows_kernel, (planes * cdiv(height, 4), cdiv(in_width, block)), image, vertical.table,
        mid, inside if need_inside else None, channels, in_height, in_width, height, low, high, *image.stride(),
        TAPS=vertical.taps, ROWS=4, BLOCK=block,
    )  # fmt: skip
    lines = planes * height
    launch(
        resize_columns_kernel, (cdiv(lines, 8), cdiv(width, 128)), mid, horizontal.table, out,
        tuple(mean), tuple(std), lines, channels, in_width, height, width, high - low,
        TAPS=horizontal.taps, ROWS=8, BLOCK=128,
    )  # fmt: skip
    return out, inside


def preprocess_reward_bwd(
    grad: Tensor,
    inside: Tensor,
    in_width: int,
    std: list[float],
    antialias: bool,
    low: float,
    high: float,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`dmdr_fast.reference.preprocess_reward_bwd`."""
    batch, channels, height, width = grad.shape
    planes, in_height = batch * channels, inside.shape[2]
    out = grad.new_empty((batch, channels, in_height, in_width), dtype=dtype)
    vertical, horizontal = _filters((in_height, in_width), (height, width), antialias, grad)

    mid = grad.new_empty((planes, height, in_width), dtype=torch.float32)
    lines = planes * height
    outputs = math.ceil(2 * horizontal.reach / horizontal.scale) + 3
    launch(
        resize_columns_bwd_kernel, (cdiv(lines, 8), cdiv(in_width, 128)), grad, horizontal.table,
        mid, tuple(std), lines, channels, in_width, height, width, *grad.stride(), horizontal.scale, horizontal.reach,
        high - low, TAPS=horizontal.taps, OUTPUTS=outputs, ROWS=8, BLOCK=128,
    )  # fmt: skip
    block = _columns(in_width, out)
    launch(
        resize_rows_bwd_kernel, (planes * cdiv(in_height, 8), cdiv(in_width, block)), mid, vertical.table,
        inside.contiguous(), out, in_height, in_width, height, vertical.scale, vertical.reach,
        TAPS=vertical.taps, ROWS=8, BLOCK=block,
    )  # fmt: skip
    return out


def _filters(
    sizes_in: tuple[int, int], sizes_out: tuple[int, int], antialias: bool, like: Tensor
) -> tuple[_Filter, _Filter]:
    """Those of the rows and of the columns."""
    rows, columns = zip(sizes_in, sizes_out, strict=True)
    return filter_of(like.device, *rows, antialias), filter_of(like.device, *columns, antialias)


@kept
def filter_of(device: torch.device, size_in: int, size_out: int, antialias: bool) -> _Filter:
    """The filter from ``size_in`` to ``size_out``."""
    scale = size_in / size_out
    # Half the window of the cubic kernel, stretched where the image shrinks.
    support = 2 * max(scale, 1.0) if antialias else 2.0
    taps = 2 * math.ceil(support) + 1 if antialias else 4
    starts, stops = torch.empty((2, size_out), dtype=torch.int32, device=device).unbind()
    table = Filter(torch.empty((taps, size_out), device=device, dtype=torch.float32), starts, stops)
    launch(
        filter_kernel, (cdiv(size_out, 64),), table, size_in, size_out, scale, ANTIALIAS=antialias, TAPS=taps, BLOCK=64,
        num_warps=2,
    )  # fmt: skip
    return _Filter(table, taps, scale, support + 1)


def _columns(width: int, pixels: Tensor) -> int:
    """Columns of a block: one 16-byte access for each of 128 threads, or all of a narrower image's."""
    return min(128 * (16 // pixels.element_size()), max(32, next_power_of_2(width)))
