"""Second stages of sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import Launches, cdiv, next_power_of_2
from dmdr_fast.kernels.sums import sum_chunks_kernel, sum_rows_kernel


def sum_rows(run: Launches, parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[R] of contiguous parts [R, C], in ``dtype``."""
    rows, count = parts.shape
    out = run.new((rows,), dtype)
    block = min(1024, max(32, next_power_of_2(count)))
    run.launch(sum_rows_kernel, (rows,), parts, out, count, BLOCK=block, num_warps=max(1, block // 256))
    return out


def sum_chunks(
    run: Launches, parts: Tensor, out: Tensor, second_parts: Tensor | None = None, second_out: Tensor | None = None
) -> None:
    """Write the sums over dimension 1 of contiguous float32 parts [G, C, D] to out [G, D], rounded to its dtype."""
    groups, chunks, width = parts.shape
    rows = min(64, next_power_of_2(chunks))
    run.launch(
        sum_chunks_kernel, (groups * cdiv(width, 64),), parts, out, second_parts, second_out, chunks, width,
        ROWS=rows, BLOCK=64, num_warps=4,
    )  # fmt: skip
