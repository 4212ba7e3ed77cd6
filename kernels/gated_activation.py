"""value * activation(gate) of packed halves (GEGLU, SwiGLU), and its gradient, over tiles of rows and columns."""

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import store_as


@triton.jit
def gated_activation_kernel(
    value, gate, out, rows, row_stride, width, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per ROWS x BLOCK elements; value and gate are the halves of the packed rows."""
    row, column, on = _tile(rows, width, ROWS, BLOCK)
    at = row * row_stride + column
    x = tl.load(gate + at, mask=on, other=0).to(tl.float32)
    activation, _ = _activation(x, ACTIVATION)
    store_as(out + row * width + column, tl.load(value + at, mask=on, other=0).to(tl.float32) * activation, on)


@triton.jit
def gated_activation_bwd_kernel(
    grad, value, gate, grad_value, grad_gate, rows, row_stride, grad_stride, width,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per ROWS x BLOCK elements; grad_value and grad_gate are the halves of contiguous rows."""
    row, column, on = _tile(rows, width, ROWS, BLOCK)
    at = row * row_stride + column
    incoming = tl.load(grad + row * grad_stride + column, mask=on, other=0).to(tl.float32)
    x = tl.load(gate + at, mask=on, other=0).to(tl.float32)
    activation, slope = _activation(x, ACTIVATION)
    to = row * (2 * width) + column
    store_as(grad_value + to, incoming * activation, on)
    product = incoming * tl.load(value + at, mask=on, other=0).to(tl.float32)
    store_as(grad_gate + to, product * slope, on)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, columns, which of them are inside) of this program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """(activation, its derivative); the compiler drops the one that is not used."""
    if ACTIVATION == "gelu":
        cdf = tl.fma(tl.erf(x * 0.7071067811865476), 0.5, 0.5)
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        activation, slope = x * cdf, tl.fma(x, density, cdf)
    else:
        # gelu_tanh is x sigmoid(2 z): 0.5 (1 + tanh z) without its cancellation at negative z.
        z = x
        z_slope = 1.0
        if ACTIVATION == "gelu_tanh":
            square = x * x
            z = 1.5957691216057308 * x * tl.fma(square, 0.044715, 1.0)
            z_slope = 1.5957691216057308 * tl.fma(square, 0.134145, 1.0)
        # The small one of sigmoid and 1 - sigmoid as a product: a difference would lose its digits.
        decay = tl.exp(-1.0 * tl.abs(z))
        large = 1.0 / (1.0 + decay)
        small = decay * large
        sigmoid, rest = tl.where(z < 0, small, large), tl.where(z < 0, large, small)
        activation = x * sigmoid
        slope = sigmoid * tl.fma(x * z_slope, rest, 1.0)
    return activation, slope
