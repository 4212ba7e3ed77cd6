"""residual = x + gate h and the modulated layer norm of it, in one reading, and the gradients of both."""

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import store_as
from dmdr_fast.kernels.rows import keep_or_add, load_row, norm_gradient, normalized, row_of


@triton.jit
def gated_residual_layer_norm_modulate_kernel(
    x, h, gate, shift, scale, residual, y, mean, rstd, tokens, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0)
    batch, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    on = column < width
    update = load_row(h, batch, token, column, on)
    total = tl.fma(update, load_row(gate, batch, token, column, on), load_row(x, batch, token, column, on))
    # The norm is that of the rounded residual: the backward reads that one.
    rounded = total.to(residual.dtype.element_ty)
    at = row.to(tl.int64) * width + column
    tl.store(residual + at, rounded, mask=on)
    normal, row_mean, row_rstd = normalized(rounded.to(tl.float32), on, width, eps)
    factor = 1.0 + load_row(scale, batch, token, column, on)
    store_as(y + at, tl.fma(normal, factor, load_row(shift, batch, token, column, on)), on)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit
def gated_residual_layer_norm_modulate_bwd_kernel(
    grad_residual, grad_y, residual, h, gate, scale, mean, rstd, grad_x, grad_h, grad_gate, grad_shift, grad_scale,
    tokens, width, chunks, chunk, GATE_PER_TOKEN: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per ``chunk`` tokens of a sample; gradients that nobody wants, or that do not come, are None.

    The gradients of gate, shift and scale are written per token, or per program as sums over its tokens.
    """
    batch, part = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    column = tl.arange(0, BLOCK)
    on = column < width
    gate_total = tl.zeros([BLOCK], tl.float32)
    shift_total = tl.zeros([BLOCK], tl.float32)
    scale_total = tl.zeros([BLOCK], tl.float32)
    for token in range(part * chunk, tl.minimum(part * chunk + chunk, tokens)):
        row = batch * tokens + token
        at = row.to(tl.int64) * width + column
        total = tl.zeros([BLOCK], tl.float32)
        if grad_residual is not None:
            total = load_row(grad_residual, batch, token, column, on)
        if grad_y is not None:
            row_rstd = tl.load(rstd + row)
            incoming = load_row(grad_y, batch, token, column, on)
            centered = tl.where(on, load_row(residual, batch, token, column, on) - tl.load(mean + row), 0.0)
            normal = centered * row_rstd
            inner = incoming * (1.0 + load_row(scale, batch, token, column, on))
            total += norm_gradient(inner, normal, row_rstd, width)
            if grad_shift is not None:
                shift_total = keep_or_add(
                    shift_total, incoming, grad_shift, batch, token, column, on, PER_TOKEN
                )  # fmt: skip
                scale_total = keep_or_add(
                    scale_total, incoming * normal, grad_scale, batch, token, column, on, PER_TOKEN
                )  # fmt: skip
        store_as(grad_x + at, total, on)
        if grad_h is not None:
            store_as(grad_h + at, total * load_row(gate, batch, token, column, on), on)
        if grad_gate is not None:
            product = total * load_row(h, batch, token, column, on)
            gate_total = keep_or_add(
                gate_total, product, grad_gate, batch, token, column, on, GATE_PER_TOKEN
            )  # fmt: skip
    if grad_gate is not None and not GATE_PER_TOKEN:
        store_as(row_of(grad_gate, batch, part) + column, gate_total, on)
    if grad_shift is not None and not PER_TOKEN:
        store_as(row_of(grad_shift, batch, part) + column, shift_total, on)
        store_as(row_of(grad_scale, batch, part) + column, scale_total, on)
