"""Clamp, bicubic resize and normalisation of images, and the gradient, without atomics.

The filter of one dimension is a table: output i takes the inputs ``starts[i] .. stops[i] - 1`` with the weights
``weights[0 .. TAPS - 1, i]``, zeros at the end of a window shorter than TAPS. It is built in float32 in PyTorch's own
order of operations: an output's centre near 1000 is rounded by 3e-5, and another order rounds it otherwise.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import store_as


class Filter(NamedTuple):
    """The table of one dimension: float32 weights [TAPS, size_out], int32 starts and stops [size_out]."""

    weights: Any
    starts: Any
    stops: Any


@triton.jit
def filter_kernel(
    table, size_in, size_out, scale, ANTIALIAS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the table; ``scale`` is size_in / size_out."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    on = i < size_out
    if ANTIALIAS:
        stretch = tl.maximum(scale + 0.0 * i, 1.0)
        center = scale * (i + 0.5)
        start = tl.maximum((center - 2.0 * stretch + 0.5).to(tl.int32), 0)
        stop = tl.minimum((center + 2.0 * stretch + 0.5).to(tl.int32), size_in)
        inverse = tl.div_rn(1.0, stretch)
        total = tl.zeros([BLOCK], tl.float32)
        for tap in range(TAPS):
            weight = _cubic(tl.abs((tap + (start - center) + 0.5) * inverse), -0.5)
            total += tl.where(start + tap < stop, weight, 0.0)
        for tap in range(TAPS):
            weight = tl.div_rn(_cubic(tl.abs((tap + (start - center) + 0.5) * inverse), -0.5), total)
            tl.store(table.weights + tap * size_out + i, tl.where(start + tap < stop, weight, 0.0), mask=on)
    else:
        position = scale * (i + 0.5) - 0.5
        first = tl.floor(position)
        t = position - first
        first = first.to(tl.int32) - 1
        start = tl.maximum(first, 0)
        for tap in range(TAPS):
            # Taps beyond an edge count for the pixel at the edge.
            weight = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(4):
                pixel = tl.minimum(tl.maximum(first + k, 0), size_in - 1)
                weight += tl.where(pixel == start + tap, _cubic(tl.abs(t + 1.0 - k), -0.75), 0.0)
            tl.store(table.weights + tap * size_out + i, weight, mask=on)
        stop = tl.minimum(start + TAPS, size_in)
    tl.store(table.starts + i, start, mask=on)
    tl.store(table.stops + i, stop, mask=on)


@triton.jit
def resize_rows_kernel(
    image, vertical, mid, inside, channels, height, width, out_height, low, high,
    batch_stride, channel_stride, row_stride, column_stride,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mid = vertical filter of clamp(image) - low, float32 [N C, out_height, width]; and where the clamp is inactive.

    One program per ROWS output rows and BLOCK columns of a plane. Every input row is read once for all of them.
    """
    blocks = tl.cdiv(out_height, ROWS)
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    first = image + (plane // channels).to(tl.int64) * batch_stride + (plane % channels).to(tl.int64) * channel_stride
    first += column.to(tl.int64) * column_stride
    i = block * ROWS + tl.arange(0, ROWS)
    on = i < out_height
    start, stop = tl.load(vertical.starts + i, mask=on, other=0), tl.load(vertical.stops + i, mask=on, other=0)
    last = tl.minimum(block * ROWS + ROWS, out_height) - 1
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for y in range(tl.load(vertical.starts + block * ROWS), tl.load(vertical.stops + last)):
        met = (y >= start) & (y < stop)
        weight = tl.load(vertical.weights + (y - start) * out_height + i, mask=met, other=0)
        row = tl.load(first + tl.cast(y, tl.int64) * row_stride, mask=column < width, other=0).to(tl.float32)
        # Not a weight of 0: a NaN stays within the windows that it is in.
        total = tl.where(met[:, None], tl.fma(_clamped(row, low, high) - low, weight[:, None], total), total)
    to = mid + ((plane * out_height).to(tl.int64) + i)[:, None] * width + column
    tl.store(to, total, mask=on[:, None] & (column < width))
    if inside is not None:
        # The input rows are shared out evenly: these ones are this program's.
        stop = ((block + 1) * ROWS * height) // out_height if (block + 1) * ROWS < out_height else height
        for y in range(block * ROWS * height // out_height, stop):
            row = tl.load(first + tl.cast(y, tl.int64) * row_stride, mask=column < width, other=0).to(tl.float32)
            flags = ((row >= low) & (row <= high) & (column < width)).to(tl.int32)
            bits = tl.sum(tl.reshape(flags, [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :], 1)
            byte = tl.program_id(1) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
            line = (plane * height + y).to(tl.int64) * tl.cdiv(width, 8)
            tl.store(inside + line + byte, bits.to(tl.uint8), mask=byte < tl.cdiv(width, 8))


# Neighbouring threads take neighbouring outputs, whose windows overlap, and a thread a column of ROWS rows with one
# weight: hiding that the width is divisible by 16 keeps Triton from giving each thread 8 columns for a wide store.
@triton.jit(do_not_specialize=["out_width"])
def resize_columns_kernel(
    mid, horizontal, out, mean, std, lines, channels, width, out_height, out_width, span,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = (horizontal filter of mid / span - mean) / std, over ``lines`` = N C out_height rows."""
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # [1, BLOCK] from the start: a vector would go through shared memory for every tap.
    i = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside, on = i < out_width, (line < lines)[:, None] & (i < out_width)
    start, stop = (
        tl.load(horizontal.starts + i, mask=inside, other=0),
        tl.load(horizontal.stops + i, mask=inside, other=0),
    )
    first = mid + line.to(tl.int64)[:, None] * width
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for tap in range(TAPS):
        weight = tl.load(horizontal.weights + tap * out_width + i, mask=inside, other=0)
        pixel = start + tap
        total = tl.fma(tl.load(first + pixel, mask=on & (pixel < stop), other=0), weight, total)
    channel = line // out_height % channels
    result = tl.div_rn(total, span + 0.0 * total) - _of_channel(mean, channel)[:, None]
    result = tl.div_rn(result, _of_channel(std, channel)[:, None] + 0.0 * total)
    store_as(out + line.to(tl.int64)[:, None] * out_width + i, result, on)


@triton.jit(do_not_specialize=["width"])
def resize_columns_bwd_kernel(
    grad, horizontal, mid, std, lines, channels, width, out_height, out_width,
    batch_stride, channel_stride, row_stride, column_stride, scale, reach, span,
    TAPS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mid = grad / (std span) times the horizontal filter's matrix, float32 [N C out_height, width].

    An input is met by at most OUTPUTS consecutive outputs; ``reach`` is the filter's half width, and one more.
    """
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    plane, channel = line // out_height, line // out_height % channels
    first = grad + (plane // channels).to(tl.int64) * batch_stride + channel.to(tl.int64) * channel_stride
    first = (first + (line % out_height).to(tl.int64) * row_stride)[:, None]
    lowest = _first_output(x, scale, reach)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(OUTPUTS):
        output = lowest + k
        tap = x - tl.load(horizontal.starts + output, mask=output < out_width, other=0)
        met = (output < out_width) & (tap >= 0) & (tap < TAPS)
        weight = tl.load(horizontal.weights + tap * out_width + output, mask=met, other=0)
        at = first + output.to(tl.int64) * column_stride
        value = tl.load(at, mask=met & (line < lines)[:, None], other=0).to(tl.float32)
        total = tl.fma(value, weight, total)
    total = tl.div_rn(total, (span * _of_channel(std, channel))[:, None] + 0.0 * total)
    tl.store(mid + line.to(tl.int64)[:, None] * width + x, total, mask=(line < lines)[:, None] & (x < width))


@triton.jit
def resize_rows_bwd_kernel(
    mid, vertical, inside, out, height, width, out_height, scale, reach,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the vertical filter's matrix, transposed, times mid, where the clamp was inactive.

    One program per ROWS input rows and BLOCK columns of a plane; a row of mid is read once for all of them.
    """
    blocks = tl.cdiv(height, ROWS)
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    x = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    y = block * ROWS + tl.arange(0, ROWS)
    lowest = _first_output(block * ROWS, scale, reach)
    highest = tl.minimum(((block * ROWS + ROWS + reach) / scale).to(tl.int32) + 1, out_height)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(lowest, highest):
        tap = y - tl.load(vertical.starts + i)
        weight = tl.load(vertical.weights + tap * out_height + i, mask=(tap >= 0) & (tap < TAPS), other=0)
        line = mid + (tl.cast(plane, tl.int64) * out_height + i) * width
        row = tl.load(line + x, mask=x < width, other=0)
        total = tl.fma(row, weight[:, None], total)
    line = (plane * height).to(tl.int64) + y[:, None]
    stride = tl.cdiv(width, 8)
    byte = (tl.program_id(1) * (BLOCK // 8) + tl.arange(0, BLOCK // 8))[None, :]
    on = (y < height)[:, None]
    bits = tl.load(inside + line * stride + byte, mask=on & (byte < stride), other=0).to(tl.int32)
    flags = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    total = tl.where(tl.reshape(flags, [ROWS, BLOCK]) != 0, total, 0.0)
    store_as(out + line * width + x, total, on & (x < width))


@triton.jit
def _first_output(x, scale, reach):
    """An output that is not beyond the first one whose window meets the input ``x``."""
    return tl.maximum(((x + 0.5 - reach) / scale - 1.5).to(tl.int32), 0)


@triton.jit
def _cubic(x, a: tl.constexpr):
    """Keys' cubic convolution kernel of x >= 0; 0 from 2 on."""
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _clamped(x, low, high):
    """NaN stays NaN."""
    raised = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _of_channel(values, channel):
    """values[channel] of a tuple."""
    result = tl.zeros(channel.shape, tl.float32)
    for c in tl.static_range(len(values)):
        result = tl.where(channel == c, values[c], result)
    return result
