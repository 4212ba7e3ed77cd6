"""RMS norm over the head dimension and rotary embedding of queries and keys, and their gradients.

A rotation acts on pairs (a, b): neighbours where interleaved, else the two halves (``half`` is ceil(D / 2), which the
host computes: the compiler then knows that it is divisible by 16). One launch does q and k: the
programs of a token are its blocks of HEADS query heads, then those of the key heads. Cosine and sine of a token are
read once for all heads of a block.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """A tensor [B, T, H, D] whose last dimension is contiguous: its start and the strides of B, T and H."""

    pointer: Any
    batch_stride: Any
    token_stride: Any
    head_stride: Any


class Side(NamedTuple):
    """What a kernel reads and writes of queries or of keys.

    Attributes:
        x: :class:`Heads`.
        grad: :class:`Heads` of the incoming gradient; None in the forward.
        weight: [D] or None.
        out: the result, or the gradient of x; contiguous like x.
        rstd: [B, T, H] float32.
        parts: rows of partial sums of the weight's gradient; None where it is not needed.
        heads: H.
    """

    x: Any
    grad: Any
    weight: Any
    out: Any
    rstd: Any
    parts: Any
    heads: Any


class Table(NamedTuple):
    """cos or sin [B or 1, T, D], the last dimension contiguous."""

    pointer: Any
    batch_stride: Any
    token_stride: Any


@triton.jit
def qk_norm_rope_kernel(
    q, k, cos, sin, tokens, width, half, q_blocks, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program per token and block of heads."""
    block = tl.program_id(1)
    if block < q_blocks:
        _forward(q, cos, sin, block, tokens, width, half, eps, HEADS, PAIRS, INTERLEAVED)
    else:
        _forward(k, cos, sin, block - q_blocks, tokens, width, half, eps, HEADS, PAIRS, INTERLEAVED)


@triton.jit
def qk_norm_rope_bwd_kernel(
    q, k, cos, sin, tokens, width, half, q_blocks, k_blocks, rows, chunk,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program per ``chunk`` tokens (of ``rows`` = batch x tokens) and block of heads."""
    block = tl.program_id(1)
    if block < q_blocks:
        _backward(q, cos, sin, block, q_blocks, tokens, width, half, rows, chunk, HEADS, PAIRS, INTERLEAVED)
    else:
        _backward(
            k, cos, sin, block - q_blocks, k_blocks, tokens, width, half, rows, chunk, HEADS, PAIRS, INTERLEAVED
        )  # fmt: skip


@triton.jit
def _forward(
    side, cos, sin, block, tokens, width, half, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    batch, token = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    head = block * HEADS + tl.arange(0, HEADS)
    inside = head < side.heads
    a, b = _load_heads(side.x, batch, token, head, inside, width, half, PAIRS, INTERLEAVED)
    mean = tl.div_rn(tl.sum(tl.fma(a, a, b * b), 1), width * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    row = (tl.program_id(0).to(tl.int64) * side.heads) + head
    tl.store(side.rstd + row, rstd, mask=inside)
    a, b = a * rstd[:, None], b * rstd[:, None]
    if side.weight is not None:
        weight_a, weight_b = _load_pairs(side.weight, width, half, PAIRS, INTERLEAVED)
        a, b = a * weight_a[None, :], b * weight_b[None, :]
    if cos is not None:
        cos_a, cos_b = _load_table(cos, batch, token, width, half, PAIRS, INTERLEAVED)
        sin_a, sin_b = _load_table(sin, batch, token, width, half, PAIRS, INTERLEAVED)
        a, b = tl.fma(a, cos_a, -1.0 * b * sin_a), tl.fma(b, cos_b, a * sin_b)
    _store_heads(side.out, row, inside, width, half, a, b, PAIRS, INTERLEAVED)


@triton.jit
def _backward(
    side, cos, sin, block, blocks, tokens, width, half, rows, chunk,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    head = block * HEADS + tl.arange(0, HEADS)
    inside = head < side.heads
    if side.weight is not None:
        weight_a, weight_b = _load_pairs(side.weight, width, half, PAIRS, INTERLEAVED)
    total_a = tl.zeros([HEADS, PAIRS], tl.float32)
    total_b = tl.zeros([HEADS, PAIRS], tl.float32)
    first = tl.program_id(0) * chunk
    for at in range(first, tl.minimum(first + chunk, rows)):
        batch, token = at // tokens, at % tokens
        row = tl.cast(at, tl.int64) * side.heads + head
        grad_a, grad_b = _load_heads(side.grad, batch, token, head, inside, width, half, PAIRS, INTERLEAVED)
        if cos is not None:
            cos_a, cos_b = _load_table(cos, batch, token, width, half, PAIRS, INTERLEAVED)
            sin_a, sin_b = _load_table(sin, batch, token, width, half, PAIRS, INTERLEAVED)
            grad_a, grad_b = tl.fma(grad_a, cos_a, grad_b * sin_b), tl.fma(grad_b, cos_b, -1.0 * grad_a * sin_a)
        a, b = _load_heads(side.x, batch, token, head, inside, width, half, PAIRS, INTERLEAVED)
        rstd = tl.load(side.rstd + row, mask=inside, other=0)[:, None]
        a, b = a * rstd, b * rstd
        if side.parts is not None:
            total_a, total_b = tl.fma(grad_a, a, total_a), tl.fma(grad_b, b, total_b)
        if side.weight is not None:
            grad_a, grad_b = grad_a * weight_a[None, :], grad_b * weight_b[None, :]
        slope = tl.div_rn(tl.sum(tl.fma(grad_a, a, grad_b * b), 1), width * 1.0)[:, None]
        grad_a, grad_b = rstd * tl.fma(a, -slope, grad_a), rstd * tl.fma(b, -slope, grad_b)
        _store_heads(side.out, row, inside, width, half, grad_a, grad_b, PAIRS, INTERLEAVED)
    if side.parts is not None:
        row = (tl.program_id(0) * blocks + block).to(tl.int64) + tl.arange(0, 1)
        total_a, total_b = tl.sum(total_a, 0)[None, :], tl.sum(total_b, 0)[None, :]
        _store_heads(side.parts, row, row >= 0, width, half, total_a, total_b, PAIRS, INTERLEAVED)


@triton.jit
def _load_heads(
    rows, batch, token, head, inside, width, half, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """(a, b) [HEADS, PAIRS] of a token's heads in float32; 0 beyond the last head and beyond D."""
    first = rows.pointer + tl.cast(batch, tl.int64) * rows.batch_stride + tl.cast(token, tl.int64) * rows.token_stride
    first = first + head.to(tl.int64)[:, None] * rows.head_stride
    return _load(first, inside[:, None], width, half, PAIRS, INTERLEAVED)


@triton.jit
def _load_table(table, batch, token, width, half, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(a, b) [1, PAIRS] of a token."""
    first = (
        table.pointer + tl.cast(batch, tl.int64) * table.batch_stride + tl.cast(token, tl.int64) * table.token_stride
    )
    return _load(first + tl.zeros([1, 1], tl.int32), tl.full([1, 1], True, tl.int1), width, half, PAIRS, INTERLEAVED)


@triton.jit
def _load_pairs(pointer, width, half, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(a, b) [PAIRS] of a vector [D]."""
    a, b = _load(
        pointer + tl.zeros([1, 1], tl.int32), tl.full([1, 1], True, tl.int1), width, half, PAIRS, INTERLEAVED
    )  # fmt: skip
    return tl.reshape(a, [PAIRS]), tl.reshape(b, [PAIRS])


@triton.jit
def _load(first, inside, width, half, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(a, b) [R, PAIRS] of rows that start at ``first`` [R, 1]."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(first + column, mask=inside & (column < width), other=0).to(tl.float32)
        return tl.split(tl.reshape(both, [first.shape[0], PAIRS, 2]))
    else:
        column = tl.arange(0, PAIRS)[None, :]
        a = tl.load(first + column, mask=inside & (column < half), other=0).to(tl.float32)
        b = tl.load(first + half + column, mask=inside & (column < width - half), other=0).to(tl.float32)
        return a, b


@triton.jit
def _store_heads(pointer, row, inside, width, half, a, b, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Write rows of a contiguous result [..., D], rounded once."""
    first = pointer + row[:, None] * width
    inside = inside[:, None]
    dtype: tl.constexpr = pointer.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), [a.shape[0], 2 * PAIRS])
        tl.store(first + column, both, mask=inside & (column < width))
    else:
        column = tl.arange(0, PAIRS)[None, :]
        tl.store(first + column, a.to(dtype), mask=inside & (column < half))
        tl.store(first + half + column, b.to(dtype), mask=inside & (column < width - half))
