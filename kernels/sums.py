"""Second stages of sums: partial sums of blocks added in a fixed order, so two runs give the same bits.

The only atomics are those of ``last_to_arrive``, on an integer that counts programs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def last_to_arrive(counter, programs):
    """Whether the other ``programs`` - 1 programs have been here: what they stored before can be read.

    The int32 counter is 0 before the first arrives and after the last one has.
    """
    tl.debug_barrier()  # all threads' stores come before the atomic, which releases them and acquires the others'
    last = tl.atomic_add(counter, 1) == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_rows_kernel(parts, out, count, BLOCK: tl.constexpr):
    """out[r] = sum of parts[r, :count]; one program per row."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], parts.dtype.element_ty)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts + row.to(tl.int64) * count + i, mask=i < count, other=0)
    tl.store(out + row, tl.sum(total).to(out.dtype.element_ty))


class Chunks(NamedTuple):
    """Contiguous float32 parts [groups, chunks, width] whose sums over the chunks go to out [groups, width]."""

    parts: Any
    out: Any
    groups: Any
    chunks: Any
    width: Any


@triton.jit
def sum_chunks_kernel(sums, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Every sum of ``sums``, each rounded once; one program per group and BLOCK columns of each, one sum after another.

    ROWS[k] chunks of sums[k] are in flight at a time: a loop that waits for every row takes 600 ns a row.
    """
    program = tl.program_id(0)
    for k in tl.static_range(len(sums)):
        blocks = tl.cdiv(sums[k].width, BLOCK)
        programs = sums[k].groups * blocks
        if (program >= 0) & (program < programs):
            column = program % blocks * BLOCK + tl.arange(0, BLOCK)
            _sum_chunks(sums[k], program // blocks, column, ROWS[k], BLOCK)
        program -= programs


@triton.jit
def _sum_chunks(one, group, column, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.arange(0, ROWS)[:, None]
    at = one.parts + (group.to(tl.int64) * one.chunks + chunk) * one.width + column[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, one.chunks, ROWS):
        on = (start + chunk < one.chunks) & (column < one.width)[None, :]
        total += tl.load(at, mask=on, other=0)
        at += tl.cast(one.width, tl.int64) * ROWS
    result = tl.sum(total, 0).to(one.out.dtype.element_ty)
    tl.store(one.out + group.to(tl.int64) * one.width + column, result, mask=column < one.width)
