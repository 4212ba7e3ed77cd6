"""Rows of D features: where row (b, t) of a tensor [B, T, D] lies, and the layer norm of one row.

Modulation tensors may be shared by the tokens of a sample or by the whole batch: a dimension of size 1 has stride 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor [B, T, D] whose last dimension is contiguous: its start and the strides of B and T in elements."""

    pointer: Any
    batch_stride: Any
    token_stride: Any


@triton.jit
def row_of(rows, batch, token):
    """Where row (batch, token) starts."""
    return rows.pointer + batch.to(tl.int64) * rows.batch_stride + tl.cast(token, tl.int64) * rows.token_stride


@triton.jit
def load_row(rows, batch, token, column, on):
    """Row (batch, token) in float32, 0 where ``on`` is not set."""
    return tl.load(row_of(rows, batch, token) + column, mask=on, other=0).to(tl.float32)


@triton.jit
def normalized(x, on, width, eps):
    """(x - mean) rstd, mean and rstd of one row."""
    mean = tl.div_rn(tl.sum(x), width * 1.0)
    centered = tl.where(on, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(centered * centered), width * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return centered * rstd, mean, rstd


@triton.jit
def norm_gradient(inner, normal, rstd, width):
    """The gradient of a row x from ``inner``, that of its normalised values."""
    mean = tl.div_rn(tl.sum(inner), width * 1.0)
    slope = tl.div_rn(tl.sum(inner * normal), width * 1.0)
    return rstd * (tl.fma(normal, -slope, inner) - mean)


@triton.jit
def keep_or_add(total, value, rows, batch, token, column, on, PER_TOKEN: tl.constexpr):
    """A modulation's gradient: written for each token where each has its own, else added to ``total``."""
    if PER_TOKEN:
        tl.store(row_of(rows, batch, token) + column, value.to(rows.pointer.dtype.element_ty), mask=on)
        return total
    else:
        return total + value
