"""Rows of D features: where row (b, t) of a tensor [B, T, D] lies, and the arithmetic of rows.

A block has a power of two of lanes: 44 % of those that hold 1152 features would be idle. A row is therefore a pair of
blocks, :class:`Pieces`. The functions here take and return such pairs, and a row is 0 beyond its features.

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


class Pieces(NamedTuple):
    """What a kernel of rows is compiled for.

    Attributes:
        width: D.
        first: lanes of the first block, all of them features.
        rest: lanes of the second block, at least D - first.
    """

    width: Any
    first: Any
    rest: Any


@triton.jit
def row_of(rows, batch, token):
    """Where row (batch, token) starts."""
    return rows.pointer + batch.to(tl.int64) * rows.batch_stride + tl.cast(token, tl.int64) * rows.token_stride


@triton.jit
def load_row(rows, batch, token, ROW: tl.constexpr):
    """Row (batch, token) in float32."""
    start = row_of(rows, batch, token)
    first = tl.load(start + tl.arange(0, ROW.first))
    at = start + ROW.first + tl.arange(0, ROW.rest)
    rest = tl.load(at) if ROW.first + ROW.rest == ROW.width else tl.load(at, mask=_inside(ROW), other=0)
    return first.to(tl.float32), rest.to(tl.float32)


@triton.jit
def store_row(start, row, ROW: tl.constexpr):
    """Write a row to ``start`` .. ``start + D - 1``, rounded once."""
    dtype: tl.constexpr = start.dtype.element_ty
    tl.store(start + tl.arange(0, ROW.first), row[0].to(dtype))
    at = start + ROW.first + tl.arange(0, ROW.rest)
    if ROW.first + ROW.rest == ROW.width:
        tl.store(at, row[1].to(dtype))
    else:
        tl.store(at, row[1].to(dtype), mask=_inside(ROW))


@triton.jit
def _inside(ROW: tl.constexpr):
    """Which lanes of the second piece are features."""
    return tl.arange(0, ROW.rest) < ROW.width - ROW.first


@triton.jit
def full_row(value, ROW: tl.constexpr):
    """``value`` in every lane."""
    return tl.full([ROW.first], value, tl.float32), tl.full([ROW.rest], value, tl.float32)


@triton.jit
def rounded_row(row, dtype: tl.constexpr):
    """A row as it is read again after it was written in ``dtype``."""
    return row[0].to(dtype).to(tl.float32), row[1].to(dtype).to(tl.float32)


@triton.jit
def plus(a, b):
    """a + b."""
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def times(a, b):
    """a b."""
    return a[0] * b[0], a[1] * b[1]


@triton.jit
def times_rows(row, rows, batch, token, ROW: tl.constexpr):
    """``row`` times row (batch, token) of ``rows``; None is 1."""
    if rows is not None:
        row = times(row, load_row(rows, batch, token, ROW))
    return row


@triton.jit
def times_plus(a, b, c):
    """a b + c, rounded once."""
    return tl.fma(a[0], b[0], c[0]), tl.fma(a[1], b[1], c[1])


@triton.jit
def one_plus(a):
    return 1.0 + a[0], 1.0 + a[1]


@triton.jit
def mean_of(row, ROW: tl.constexpr):
    """The mean over the features."""
    return tl.div_rn(tl.sum(row[0]) + tl.sum(row[1]), ROW.width * 1.0)


@triton.jit
def centered(row, mean, ROW: tl.constexpr):
    """row - mean."""
    rest = row[1] - mean
    if ROW.first + ROW.rest != ROW.width:
        rest = tl.where(_inside(ROW), rest, 0.0)
    return row[0] - mean, rest


@triton.jit
def normalized(row, eps, ROW: tl.constexpr):
    """((row - mean) rstd, mean, rstd) of a row."""
    mean = mean_of(row, ROW)
    distance = centered(row, mean, ROW)
    rstd = rms_rstd(distance, eps, ROW)
    return scaled(distance, rstd), mean, rstd


@triton.jit
def rms_rstd(row, eps, ROW: tl.constexpr):
    """1 / sqrt(mean row^2 + eps)."""
    return tl.div_rn(1.0, tl.sqrt_rn(mean_of(times(row, row), ROW) + eps))


@triton.jit
def scaled(row, factor):
    """A number times a row."""
    return row[0] * factor, row[1] * factor


@triton.jit
def norm_gradient(inner, normal, rstd, ROW: tl.constexpr):
    """The gradient of a row x from ``inner``, that of its normalised values."""
    mean = mean_of(inner, ROW)
    slope = mean_of(times(inner, normal), ROW)
    first = rstd * (tl.fma(normal[0], -slope, inner[0]) - mean)
    rest = rstd * (tl.fma(normal[1], -slope, inner[1]) - mean)
    return first, rest


@triton.jit
def rms_norm_gradient(inner, normal, rstd, ROW: tl.constexpr):
    """The gradient of a row x from ``inner``, that of normal = x rstd."""
    slope = mean_of(times(inner, normal), ROW)
    return rstd * tl.fma(normal[0], -slope, inner[0]), rstd * tl.fma(normal[1], -slope, inner[1])
