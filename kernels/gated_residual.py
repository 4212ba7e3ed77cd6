"""x + gate h, and its gradients, over tiles of rows and columns."""

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import store_as


@triton.jit
def gated_residual_kernel(
    x, h, gate, out, tokens, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr
):  # fmt: skip
    """One program per ROWS tokens of a sample and BLOCK features."""
    parts = tl.cdiv(tokens, ROWS)
    batch, token = tl.program_id(0) // parts, (tl.program_id(0) % parts) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = (token < tokens)[:, None] & (column < width)[None, :]
    residual = load_tile(x, batch, token, column, on)
    update = load_tile(h, batch, token, column, on)
    residual = tl.fma(update, _gate(gate, batch, token, column, on, width, PER_TOKEN), residual)
    store_tile(out, batch, token, column, on, tokens, width, residual)


@triton.jit
def gated_residual_bwd_kernel(
    grad, h, gate, grad_h, grad_gate, tokens, width, chunks, chunk,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr, GATE_PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """One program per ``chunk`` tokens of a sample and BLOCK features.

    The gate's gradient is written per token (PER_TOKEN), or per program as the sum over its tokens.
    """
    batch, part = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum(part * chunk + chunk, tokens)
    for first in range(part * chunk, last, ROWS):
        token = first + tl.arange(0, ROWS)
        on = (token < last)[:, None] & inside[None, :]
        incoming = load_tile(grad, batch, token, column, on)
        if grad_h is not None:
            factor = _gate(gate, batch, token, column, on, width, GATE_PER_TOKEN)
            store_tile(grad_h, batch, token, column, on, tokens, width, incoming * factor)
        if grad_gate is not None:
            product = incoming * load_tile(h, batch, token, column, on)
            if PER_TOKEN:
                store_tile(grad_gate, batch, token, column, on, tokens, width, product)
            else:
                total += product
    if grad_gate is not None and not PER_TOKEN:
        row = (batch * chunks + part).to(tl.int64)
        store_as(grad_gate + row * width + column, tl.sum(total, 0), inside)


@triton.jit
def load_tile(rows, batch, token, column, on):
    """Rows ``token`` of a sample, in float32, 0 where ``on`` is not set."""
    first = rows.pointer + batch.to(tl.int64) * rows.batch_stride
    offsets = token.to(tl.int64)[:, None] * rows.token_stride + column[None, :]
    return tl.load(first + offsets, mask=on, other=0).to(tl.float32)


@triton.jit
def store_tile(pointer, batch, token, column, on, tokens, width, value):
    """Write rows ``token`` of a sample of a contiguous result [B, T, D], rounded once."""
    row = batch.to(tl.int64) * tokens + token
    store_as(pointer + row[:, None] * width + column[None, :], value, on)


@triton.jit
def _gate(gate, batch, token, column, on, width, PER_TOKEN: tl.constexpr):
    """The gate of each token, or the sample's one, which is loaded once for all of the tile's rows."""
    if PER_TOKEN:
        return load_tile(gate, batch, token, column, on)
    else:
        row = gate.pointer + batch.to(tl.int64) * gate.batch_stride
        return tl.load(row + column, mask=column < width, other=0).to(tl.float32)[None, :]
