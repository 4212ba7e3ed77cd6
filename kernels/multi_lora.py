"""base_out + scale_b (x A) B in two kernels, and the gradients of x, A and B.

Rows (tokens of all samples, one after the other) are taken in tiles. A tile whose samples all have scale 0 reads
neither x nor the matrices; a row of scale 0 in another tile is not read either.

The scale is a pointer and a stride: 1, or 0 where all samples share one number.

PACKED: rows are three blocks [q | k | v]. q and v have matrices and a low rank of their own, one after the other; k has
none and passes. The grid's third dimension is the part, or the block.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import store_as


@triton.jit
def project_kernel(
    x, matrix, scale, scale_stride, low_rank, rows, tokens, features, rank, feature_stride, rank_stride, part_stride,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """low_rank = scale_b (x matrix), float32 [rows, rank]; one program per tile of rows and of the rank."""
    row, batch, token, factor = _tile_of_rows(scale, scale_stride, tl.program_id(0) * ROWS, rows, tokens, ROWS)
    column = tl.program_id(1) * RANK + tl.arange(0, RANK)
    total = tl.zeros([ROWS, RANK], tl.float32)
    if tl.max((factor != 0).to(tl.int32), 0) != 0:
        line = x.pointer + (batch * x.batch_stride + token * x.token_stride)[:, None]
        if PACKED:
            line += tl.program_id(2) * 2 * features
            matrix += tl.program_id(2) * part_stride
        active = (factor != 0)[:, None]
        for start in range(0, features, FEATURES):
            feature = start + tl.arange(0, FEATURES)
            inside = feature < features
            left = tl.load(line + feature[None, :], mask=active & inside[None, :], other=0)
            at = feature[:, None] * feature_stride + column[None, :] * rank_stride
            right = tl.load(matrix + at, mask=inside[:, None] & (column < rank)[None, :], other=0)
            total = _dot(left, right, total, PRECISION, WIDE)
        total = tl.where(active, factor[:, None] * total, 0.0)
    on = (row < rows)[:, None] & (column < rank)[None, :]
    if PACKED:
        low_rank += tl.program_id(2).to(tl.int64) * rows * rank
    tl.store(low_rank + row[:, None] * rank + column[None, :], total, mask=on)


@triton.jit
def expand_kernel(
    low_rank, matrix, scale, scale_stride, base, out, rows, tokens, features, rank, rank_stride, feature_stride,
    part_stride, PACKED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out = base + low_rank matrix, base None being 0; one program per tile of rows and of features."""
    row, batch, token, factor = _tile_of_rows(scale, scale_stride, tl.program_id(0) * ROWS, rows, tokens, ROWS)
    column = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    on = (row < rows)[:, None] & (column < features)[None, :]
    if PACKED:
        block = tl.program_id(2)
        low_rank += (block // 2).to(tl.int64) * rows * rank
        matrix += block // 2 * part_stride
        factor = tl.where(block == 1, 0.0, factor)
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    if tl.max((factor != 0).to(tl.int32), 0) != 0:
        for start in range(0, rank, RANK):
            r = start + tl.arange(0, RANK)
            inside = r < rank
            active = (factor != 0)[:, None] & inside[None, :]
            left = tl.load(low_rank + row[:, None] * rank + r[None, :], mask=active, other=0)
            at = r[:, None] * rank_stride + column[None, :] * feature_stride
            right = tl.load(matrix + at, mask=inside[:, None] & (column < features)[None, :], other=0)
            total = _dot(left, right, total, PRECISION, WIDE)
    if base is not None:
        line = base.pointer + (batch * base.batch_stride + token * base.token_stride)[:, None]
        if PACKED:
            line += block * features
        total += tl.load(line + column[None, :], mask=on, other=0).to(tl.float32)
    if PACKED:
        store_as(out + row[:, None] * 3 * features + (block * features + column)[None, :], total, on)
    else:
        store_as(out + row[:, None] * features + column[None, :], total, on)


class Product(NamedTuple):
    """left^T right over all rows, in chunks of them.

    Attributes:
        left, right: :class:`Rows` of left_features and right_features.
        parts: float32 [chunks of rows, left_features * right_features], what each chunk adds.
        left_stride, right_stride: those of a part, which may be transposed.
        chunk: rows of a chunk.
        programs: one per chunk and tile of the product.
    """

    left: Any
    right: Any
    parts: Any
    left_features: Any
    right_features: Any
    left_stride: Any
    right_stride: Any
    chunk: Any
    programs: Any


@triton.jit
def outer_sums_kernel(
    products, scale, scale_stride, rows, tokens,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """The parts of each of ``products``, the programs of one after those of another."""
    program = tl.program_id(0)
    for k in tl.static_range(len(products)):
        if (program >= 0) & (program < products[k].programs):
            _outer_sums(products[k], program, scale, scale_stride, rows, tokens, PRECISION, WIDE, ROWS, LEFT, RIGHT)
        program -= products[k].programs


@triton.jit
def _outer_sums(
    product, program, scale, scale_stride, rows, tokens,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    left, right = product.left, product.right
    left_features, right_features = product.left_features, product.right_features
    tiles_across = tl.cdiv(right_features, RIGHT)
    tiles = tl.cdiv(left_features, LEFT) * tiles_across
    tile, part = program % tiles, program // tiles
    i = tile // tiles_across * LEFT + tl.arange(0, LEFT)
    j = tile % tiles_across * RIGHT + tl.arange(0, RIGHT)
    first = part * product.chunk
    last = tl.minimum(first + product.chunk, rows)
    total = tl.zeros([LEFT, RIGHT], tl.float32)
    if _any_active(scale, scale_stride, first // tokens, (last - 1) // tokens):
        for start in range(first, last, ROWS):
            _row, batch, token, factor = _tile_of_rows(scale, scale_stride, start, last, tokens, ROWS)
            active = (factor != 0)[:, None]
            at = (batch * left.batch_stride + token * left.token_stride)[:, None] + i[None, :]
            a = tl.load(left.pointer + at, mask=active & (i < left_features)[None, :], other=0)
            at = (batch * right.batch_stride + token * right.token_stride)[:, None] + j[None, :]
            b = tl.load(right.pointer + at, mask=active & (j < right_features)[None, :], other=0)
            total = _dot(tl.trans(a), b, total, PRECISION, WIDE)
    to = product.parts + part.to(tl.int64) * left_features * right_features
    on = (i < left_features)[:, None] & (j < right_features)[None, :]
    tl.store(to + i[:, None] * product.left_stride + j[None, :] * product.right_stride, total, mask=on)


@triton.jit
def _tile_of_rows(scale, scale_stride, first, rows, tokens, ROWS: tl.constexpr):
    """(row, sample, token, scale of the sample) [ROWS]; the scale is 0 beyond the last row."""
    row = first + tl.arange(0, ROWS).to(tl.int64)
    batch, token = row // tokens, row % tokens
    return row, batch, token, tl.load(scale + batch * scale_stride, mask=row < rows, other=0)


@triton.jit
def _any_active(scale, scale_stride, first, last):
    """Whether a sample of first .. last has a scale other than 0."""
    found = tl.zeros([32], tl.int32)
    for start in range(first, last + 1, 32):
        i = start + tl.arange(0, 32)
        found |= (tl.load(scale + i * scale_stride, mask=i <= last, other=0) != 0).to(tl.int32)
    return tl.max(found, 0) != 0


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """total + left right, as exact as float32 sums are.

    Two float32 factors are multiplied as PRECISION says, "ieee" or "tf32x3". A float32 factor beside a bfloat16 one
    is taken as three bfloat16 numbers: three products on the tensor cores, twice as fast as three in TF32 and with a
    third of the registers. WIDE multiplies in float32, for Triton's interpreter, whose product of bfloat16 numbers
    is one of their bit patterns.
    """
    if left.dtype == tl.bfloat16 and right.dtype == tl.float32:
        high, middle, low = _three_bfloat16(right)
        total = _product(left, low, total, PRECISION, WIDE)
        total = _product(left, middle, total, PRECISION, WIDE)
        return _product(left, high, total, PRECISION, WIDE)
    elif left.dtype == tl.float32 and right.dtype == tl.bfloat16:
        high, middle, low = _three_bfloat16(left)
        total = _product(low, right, total, PRECISION, WIDE)
        total = _product(middle, right, total, PRECISION, WIDE)
        return _product(high, right, total, PRECISION, WIDE)
    elif left.dtype != right.dtype:
        # A float16 number, like a bfloat16 one, is exact in TF32.
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="tf32x3")
    else:
        return _product(left, right, total, PRECISION, WIDE)


@triton.jit
def _product(left, right, total, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _three_bfloat16(value):
    """(high, middle, low) whose sum is ``value`` to 2^-24."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)
