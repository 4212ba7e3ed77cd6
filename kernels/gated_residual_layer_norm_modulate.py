"""residual = x + gate h and the modulated layer norm of it, in one reading, and the gradients of both."""

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
    rounded_row,
    row_of,
    scaled,
    store_row,
    times,
    times_plus,
)


@triton.jit
def gated_residual_layer_norm_modulate_kernel(
    x, h, gate, shift, scale, residual, y, mean, rstd, tokens, eps, ROW: tl.constexpr
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0)
    batch, token = row // tokens, row % tokens
    at = row.to(tl.int64) * ROW.width
    update = load_row(h, batch, token, ROW)
    total = times_plus(update, load_row(gate, batch, token, ROW), load_row(x, batch, token, ROW))
    # The norm is that of the rounded residual: the backward reads that one.
    total = rounded_row(total, residual.dtype.element_ty)
    store_row(residual + at, total, ROW)
    normal, row_mean, row_rstd = normalized(total, eps, ROW)
    factor = one_plus(load_row(scale, batch, token, ROW))
    store_row(y + at, times_plus(normal, factor, load_row(shift, batch, token, ROW)), ROW)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit
def gated_residual_layer_norm_modulate_bwd_kernel(
    grad_residual, grad_y, residual, h, gate, scale, mean, rstd, grad_x, grad_h, grad_gate, grad_shift, grad_scale,
    tokens, chunks, chunk, GATE_PER_TOKEN: tl.constexpr, PER_TOKEN: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One program per ``chunk`` tokens of a sample; gradients that nobody wants, or that do not come, are None.

    GATE_PER_TOKEN: each token has its own gate, and its gradient is written per token; else the gate is read once and
    its gradient is a partial sum per program. PER_TOKEN says the same of shift and scale.
    """
    batch, part = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    if not PER_TOKEN:
        factor = one_plus(load_row(scale, batch, 0, ROW))
    if not GATE_PER_TOKEN:
        gate_row = load_row(gate, batch, 0, ROW)
    gate_total, shift_total, scale_total = full_row(0.0, ROW), full_row(0.0, ROW), full_row(0.0, ROW)
    for token in range(part * chunk, tl.minimum(part * chunk + chunk, tokens)):
        row = batch * tokens + token
        at = row.to(tl.int64) * ROW.width
        total = full_row(0.0, ROW)
        if grad_residual is not None:
            total = load_row(grad_residual, batch, token, ROW)
        if grad_y is not None:
            row_rstd = tl.load(rstd + row)
            incoming = load_row(grad_y, batch, token, ROW)
            normal = scaled(centered(load_row(residual, batch, token, ROW), tl.load(mean + row), ROW), row_rstd)
            if PER_TOKEN:
                factor = one_plus(load_row(scale, batch, token, ROW))
            total = plus(total, norm_gradient(times(incoming, factor), normal, row_rstd, ROW))
            if grad_shift is not None:
                if PER_TOKEN:
                    store_row(row_of(grad_shift, batch, token), incoming, ROW)
                    store_row(row_of(grad_scale, batch, token), times(incoming, normal), ROW)
                else:
                    shift_total = plus(shift_total, incoming)
                    scale_total = plus(scale_total, times(incoming, normal))
        store_row(grad_x + at, total, ROW)
        if grad_h is not None:
            if GATE_PER_TOKEN:
                gate_row = load_row(gate, batch, token, ROW)
            store_row(grad_h + at, times(total, gate_row), ROW)
        if grad_gate is not None:
            product = times(total, load_row(h, batch, token, ROW))
            if GATE_PER_TOKEN:
                store_row(row_of(grad_gate, batch, token), product, ROW)
            else:
                gate_total = plus(gate_total, product)
    if grad_gate is not None and not GATE_PER_TOKEN:
        store_row(row_of(grad_gate, batch, part), gate_total, ROW)
    if grad_shift is not None and not PER_TOKEN:
        store_row(row_of(grad_shift, batch, part), shift_total, ROW)
        store_row(row_of(grad_scale, batch, part), scale_total, ROW)
