"""y = (x - mean) rstd (1 + scale) + shift, and its gradients. One program holds a row."""

import triton
import triton.language as tl

from dmdr_fast.kernels.rows import (
    centered,
    full_row,
    load_row,
    norm_gradient,
    normalized,
    one_plus,
    plus,
    row_of,
    scaled,
    store_row,
    times,
    times_plus,
)


@triton.jit
def layer_norm_modulate_kernel(x, shift, scale, y, mean, rstd, tokens, eps, ROW: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0)
    batch, token = row // tokens, row % tokens
    normal, row_mean, row_rstd = normalized(load_row(x, batch, token, ROW), eps, ROW)
    factor = one_plus(load_row(scale, batch, token, ROW))
    result = times_plus(normal, factor, load_row(shift, batch, token, ROW))
    store_row(y + row.to(tl.int64) * ROW.width, result, ROW)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit
def layer_norm_modulate_bwd_kernel(
    grad, x, scale, mean, rstd, grad_x, grad_shift, grad_scale, tokens, chunks, chunk,
    PER_TOKEN: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One program per ``chunk`` tokens of a sample.

    PER_TOKEN: each token has its own shift and scale, and their gradients are written per token. Else scale is read
    once, and grad_shift and grad_scale are rows of partial sums, one per program, one sample's after the other.
    """
    batch, part = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    if not PER_TOKEN:
        factor = one_plus(load_row(scale, batch, 0, ROW))
    shift_total, scale_total = full_row(0.0, ROW), full_row(0.0, ROW)
    for token in range(part * chunk, tl.minimum(part * chunk + chunk, tokens)):
        row = batch * tokens + token
        row_rstd = tl.load(rstd + row)
        incoming = load_row(grad, batch, token, ROW)
        normal = scaled(centered(load_row(x, batch, token, ROW), tl.load(mean + row), ROW), row_rstd)
        if grad_x is not None:
            if PER_TOKEN:
                factor = one_plus(load_row(scale, batch, token, ROW))
            result = norm_gradient(times(incoming, factor), normal, row_rstd, ROW)
            store_row(grad_x + row.to(tl.int64) * ROW.width, result, ROW)
        if grad_shift is not None:
            if PER_TOKEN:
                store_row(row_of(grad_shift, batch, token), incoming, ROW)
                store_row(row_of(grad_scale, batch, token), times(incoming, normal), ROW)
            else:
                shift_total = plus(shift_total, incoming)
                scale_total = plus(scale_total, times(incoming, normal))
    if grad_shift is not None and not PER_TOKEN:
        store_row(row_of(grad_shift, batch, part), shift_total, ROW)
        store_row(row_of(grad_scale, batch, part), scale_total, ROW)
