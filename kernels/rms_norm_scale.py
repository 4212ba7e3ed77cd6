"""y = x rstd weight scale with rstd = 1 / sqrt(mean x^2 + eps), and its gradients. One program holds a row.

weight [D] and scale are :class:`Rows`, either may be None; those of weight have no strides.
"""

import triton
import triton.language as tl

from dmdr_fast.kernels.rows import (
    full_row,
    load_row,
    plus,
    rms_norm_gradient,
    rms_rstd,
    row_of,
    scaled,
    store_row,
    times,
    times_rows,
)


@triton.jit
def rms_norm_scale_kernel(x, weight, scale, y, rstd, tokens, eps, ROW: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0)
    batch, token = row // tokens, row % tokens
    value = load_row(x, batch, token, ROW)
    row_rstd = rms_rstd(value, eps, ROW)
    weighted = times_rows(scaled(value, row_rstd), weight, batch, token, ROW)
    store_row(y + row.to(tl.int64) * ROW.width, times_rows(weighted, scale, batch, token, ROW), ROW)
    tl.store(rstd + row, row_rstd)


@triton.jit
def rms_norm_scale_bwd_kernel(
    grad, x, weight, scale, rstd, grad_x, grad_weight, grad_scale, tokens, chunks, chunk,
    PER_TOKEN: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One program per ``chunk`` tokens of a sample; gradients that nobody wants are None.

    grad_weight has a row of partial sums per program, one sample's after the other. PER_TOKEN: each token has its own
    scale, and grad_scale is written per token. Else scale is read once, and grad_scale is partial sums like
    grad_weight: both are made from one sum over the program's tokens.
    """
    batch, part = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    total = full_row(0.0, ROW)
    factor = times_rows(full_row(1.0, ROW), weight, batch, 0, ROW)
    if not PER_TOKEN:
        factor = times_rows(factor, scale, batch, 0, ROW)
    for token in range(part * chunk, tl.minimum(part * chunk + chunk, tokens)):
        row = batch * tokens + token
        row_rstd = tl.load(rstd + row)
        incoming = load_row(grad, batch, token, ROW)
        normal = scaled(load_row(x, batch, token, ROW), row_rstd)
        product = times(incoming, normal)
        if grad_x is not None:
            inner = times(incoming, factor)
            if PER_TOKEN:
                inner = times_rows(inner, scale, batch, token, ROW)
            store_row(grad_x + row.to(tl.int64) * ROW.width, rms_norm_gradient(inner, normal, row_rstd, ROW), ROW)
        if PER_TOKEN:
            if grad_scale is not None:
                store_row(row_of(grad_scale, batch, token), times(product, factor), ROW)
            product = times_rows(product, scale, batch, token, ROW)
        total = plus(total, product)
    if not PER_TOKEN:
        if grad_scale is not None:
            store_row(row_of(grad_scale, batch, part), times_rows(total, weight, batch, 0, ROW), ROW)
        total = times_rows(total, scale, batch, 0, ROW)
    if grad_weight is not None:
        store_row(row_of(grad_weight, batch, part), total, ROW)
