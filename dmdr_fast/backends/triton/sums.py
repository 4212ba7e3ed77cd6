"""Second stages of sums in a fixed order."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.backends.triton.launch import Launches, cdiv, next_power_of_2
from dmdr_fast.kernels.sums import Chunks, sum_chunks_kernel, sum_rows_kernel


def sum_rows(run: Launches, parts: Tensor, out: Tensor) -> None:
    """Write ``out`` [R], the sums of contiguous parts [R, C]."""
    rows, count = parts.shape
    block = min(1024, max(32, next_power_of_2(count)))
    run.launch(sum_rows_kernel, (rows,), parts, out, count, BLOCK=block, num_warps=max(1, block // 256))


def sum_chunks(run: Launches, *sums: tuple[Tensor, Tensor]) -> None:
    """(contiguous float32 parts [G, C, D], out [G, D]) each: write out, the sums over dimension 1, in one launch."""
    if not sums:
        return
    chunks = tuple(Chunks(parts, out, *parts.shape) for parts, out in sums)
    run.launch(
        sum_chunks_kernel, (sum(one.groups * cdiv(one.width, 64) for one in chunks),), chunks,
        ROWS=tuple(min(64, next_power_of_2(one.chunks)) for one in chunks), BLOCK=64, num_warps=4,
    )  # fmt: skip
