"""y = (x - mean) rstd (1 + scale) + shift, and its gradients. One program holds a row."""

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import store_as
from dmdr_fast.kernels.rows import keep_or_add, load_row, norm_gradient, normalized, row_of


@triton.jit
def layer_norm_modulate_kernel(x, shift, scale, y, mean, rstd, tokens, width, eps, BLOCK: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0)
    batch, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    on = column < width
    normal, row_mean, row_rstd = normalized(load_row(x, batch, token, column, on), on, width, eps)
    factor = 1.0 + load_row(scale, batch, token, column, on)
    result = tl.fma(normal, factor, load_row(shift, batch, token, column, on))
    store_as(y + row.to(tl.int64) * width + column, result, on)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit
def layer_norm_modulate_bwd_kernel(
    grad, x, scale, mean, rstd, grad_x, grad_shift, grad_scale, tokens, width, chunks, chunk,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per ``chunk`` tokens of a sample.

    The gradients of shift and scale are written per token, or per program as sums over its tokens: grad_shift and
    grad_scale are then the rows of partial sums, one sample's after the other.
    """
    batch, part = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    column = tl.arange(0, BLOCK)
    on = column < width
    shift_total = tl.zeros([BLOCK], tl.float32)
    scale_total = tl.zeros([BLOCK], tl.float32)
    for token in range(part * chunk, tl.minimum(part * chunk + chunk, tokens)):
        row = batch * tokens + token
        row_rstd = tl.load(rstd + row)
        incoming = load_row(grad, batch, token, column, on)
        centered = tl.where(on, load_row(x, batch, token, column, on) - tl.load(mean + row), 0.0)
        normal = centered * row_rstd
        if grad_x is not None:
            inner = incoming * (1.0 + load_row(scale, batch, token, column, on))
            result = norm_gradient(inner, normal, row_rstd, width)
            store_as(grad_x + row.to(tl.int64) * width + column, result, on)
        if grad_shift is not None:
            shift_total = keep_or_add(
                shift_total, incoming, grad_shift, batch, token, column, on, PER_TOKEN
            )  # fmt: skip
            scale_total = keep_or_add(
                scale_total, incoming * normal, grad_scale, batch, token, column, on, PER_TOKEN
            )  # fmt: skip
    if grad_shift is not None and not PER_TOKEN:
        store_as(row_of(grad_shift, batch, part) + column, shift_total, on)
        store_as(row_of(grad_scale, batch, part) + column, scale_total, on)
