"""Image preparation for reward models on the Triton kernels."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dmdr_fast.backends import at_most
from dmdr_fast.backends.triton.launch import Launches, cdiv, implements, next_power_of_2
from dmdr_fast.kernels import preprocess_reward as kernels

_at_most = functools.partial(at_most, 64, "channels", "images")


@implements("preprocess_reward_fwd", refuses=_at_most(lambda a: a.image.shape[1]))
def preprocess_reward_fwd(run: Launches, a, out) -> None:
    batch, channels, in_height, in_width = a.image.shape
    planes = batch * channels
    vertical, vertical_taps, *_ = _filter(run, in_height, a.height, a.antialias)
    horizontal, horizontal_taps, *_ = _filter(run, in_width, a.width, a.antialias)

    mid = run.new((planes, a.height, in_width), torch.float32)
    block = _columns(in_width, a.image)
    run.launch(
        kernels.resize_rows_kernel, (planes * cdiv(a.height, 4), cdiv(in_width, block)), a.image, vertical,
        mid, out.inside, channels, in_height, in_width, a.height, a.low, a.high,
        *a.image.stride(), TAPS=vertical_taps, ROWS=4, BLOCK=block,
    )  # fmt: skip
    lines = planes * a.height
    run.launch(
        kernels.resize_columns_kernel, (cdiv(lines, 8), cdiv(a.width, 128)), mid, horizontal, out.out,
        tuple(a.mean), tuple(a.std), lines, channels, in_width, a.height, a.width, a.high - a.low,
        TAPS=horizontal_taps, ROWS=8, BLOCK=128,
    )  # fmt: skip


@implements("preprocess_reward_bwd", refuses=_at_most(lambda a: a.grad.shape[1]))
def preprocess_reward_bwd(run: Launches, a, out) -> None:
    batch, channels, height, width = a.grad.shape
    planes, in_height, in_width = batch * channels, a.inside.shape[2], a.in_width
    vertical, vertical_taps, *vertical_window = _filter(run, in_height, height, a.antialias)
    horizontal, horizontal_taps, scale, reach = _filter(run, in_width, width, a.antialias)

    mid = run.new((planes, height, in_width), torch.float32)
    lines = planes * height
    outputs = math.ceil(2 * reach / scale) + 3
    run.launch(
        kernels.resize_columns_bwd_kernel, (cdiv(lines, 8), cdiv(in_width, 128)), a.grad, horizontal,
        mid, tuple(a.std), lines, channels, in_width, height, width, *a.grad.stride(), scale, reach, a.high - a.low,
        TAPS=horizontal_taps, OUTPUTS=outputs, ROWS=8, BLOCK=128,
    )  # fmt: skip
    block = _columns(in_width, out.grad_image)
    run.launch(
        kernels.resize_rows_bwd_kernel, (planes * cdiv(in_height, 8), cdiv(in_width, block)), mid, vertical,
        a.inside.contiguous(), out.grad_image, in_height, in_width, height, *vertical_window,
        TAPS=vertical_taps, ROWS=8, BLOCK=block,
    )  # fmt: skip


# Made once for a device: two launches less in each pass.
_tables: dict[tuple, kernels.Filter] = {}


def _filter(run: Launches, size_in: int, size_out: int, antialias: bool) -> tuple[kernels.Filter, int, float, float]:
    """Of one dimension: its weights and where the windows start and stop; the length of the longest window; inputs per
    output; half the width of a window in inputs, and one more."""
    scale, device = size_in / size_out, run.device
    # Half the window of the cubic kernel, stretched where the image shrinks.
    support = 2 * max(scale, 1.0) if antialias else 2.0
    taps = 2 * math.ceil(support) + 1 if antialias else 4
    key = size_in, size_out, antialias, device
    table = _tables.get(key)
    if table is None:
        weights = torch.empty((taps, size_out), dtype=torch.float32, device=device)
        table = kernels.Filter(weights, *(torch.empty(size_out, dtype=torch.int32, device=device) for _ in range(2)))
        Launches((weights,)).launch(
            kernels.filter_kernel, (cdiv(size_out, 64),), table, size_in, size_out, scale, ANTIALIAS=antialias,
            TAPS=taps, BLOCK=64, num_warps=2,
        )  # fmt: skip
        if device.type != "cuda":
            _tables[key] = table
        elif not torch.cuda.is_current_stream_capturing():  # what a graph allocates is the graph's
            torch.cuda.synchronize(device)  # whatever stream reads it next
            _tables[key] = table
    return kernels.Filter(*map(run.kept, table)), taps, scale, support + 1


def _columns(width: int, pixels: Tensor) -> int:
    """Columns of a block: one 16-byte access for each of 128 threads, or all of a narrower image's."""
    return min(128 * (16 // pixels.element_size()), max(32, next_power_of_2(width)))
