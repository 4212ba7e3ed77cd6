"""Second stages of sums: partial sums of blocks added in a fixed order. No atomics, so two runs give the same bits."""

import triton
import triton.language as tl


@triton.jit
def sum_rows_kernel(parts, out, count, BLOCK: tl.constexpr):
    """out[r] = sum of parts[r, :count]; one program per row."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], parts.dtype.element_ty)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts + row.to(tl.int64) * count + i, mask=i < count, other=0)
    tl.store(out + row, tl.sum(total).to(out.dtype.element_ty))


@triton.jit
def sum_chunks_kernel(parts, out, second_parts, second_out, chunks, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[g] = sum over c of parts[g, c, :width], rounded once; the same for the second pair where there is one.

    One program per group g and BLOCK columns. ROWS chunks are in flight at a time: a loop that waits for every row
    takes 600 ns a row.
    """
    blocks = tl.cdiv(width, BLOCK)
    group, column = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    _sum_chunks(parts, out, group, column, chunks, width, ROWS, BLOCK)
    if second_parts is not None:
        _sum_chunks(second_parts, second_out, group, column, chunks, width, ROWS, BLOCK)


@triton.jit
def _sum_chunks(parts, out, group, column, chunks, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first = parts + group.to(tl.int64) * chunks * width
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, chunks, ROWS):
        chunk = (start + tl.arange(0, ROWS))[:, None]
        on = (chunk < chunks) & (column < width)[None, :]
        total += tl.load(first + chunk.to(tl.int64) * width + column[None, :], mask=on, other=0)
    result = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + group.to(tl.int64) * width + column, result, mask=column < width)
