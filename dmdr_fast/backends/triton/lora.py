"""LoRA with one scale per sample on the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import INTERPRETED, Launches, cdiv, implements, next_power_of_2
from dmdr_fast.backends.triton.modulation import rows
from dmdr_fast.backends.triton.sums import sum_chunks
from dmdr_fast.kernels.multi_lora import Product, expand_kernel, outer_sums_kernel, project_kernel

# Programs that sum over rows for the gradient of a matrix: three per multiprocessor of an H100.
_PROGRAMS = 384


@implements("multi_lora_fwd")
def multi_lora_fwd(run: Launches, a, out) -> None:
    _project(run, a.x, a.A, a.scale, out.low_rank)
    _expand(run, out.low_rank, a.B, a.scale, a.base_out, out.out)


@implements("multi_lora_bwd")
def multi_lora_bwd(run: Launches, a, out) -> None:
    """What a sample of scale 0 holds is not read."""
    rank, out_features = a.B.shape[-2:]
    if a.need_x or a.need_A:
        low_rank_grad = run.new(a.low_rank.shape, torch.float32)
        _project(run, a.grad, run.part(a.B.mT, a.B), a.scale, low_rank_grad)
    if a.need_x:
        _expand(run, low_rank_grad, run.part(a.A.mT, a.A), a.scale, None, out.grad_x)
    products = []
    if a.need_A:
        products.append((a.x, low_rank_grad, out.grad_A, (rank, 1)))
    if a.need_B:
        products.append((a.grad, a.low_rank, out.grad_B, (1, out_features)))
    if products:
        _outer_sums(run, products, a.scale)


def _project(run: Launches, x: Tensor, matrix: Tensor, scale: Tensor, low_rank: Tensor) -> None:
    """Write scale_b (x matrix) to the float32 ``low_rank`` [B, ..., r]."""
    x_rows, count = _tokens(run, x)
    (features, rank), packed = matrix.shape[-2:], matrix.dim() == 3
    tile = {"ROWS": _side(count, 64), "FEATURES": 64 if x.element_size() == 2 else 32, "RANK": _side(rank, 64)}
    run.launch(
        project_kernel, (cdiv(count, tile["ROWS"]), cdiv(rank, tile["RANK"]), 2 if packed else 1), rows(x_rows), matrix,
        *_strided(scale), low_rank, count, x_rows.shape[1], features, rank, *matrix.stride()[-2:], matrix.stride(0),
        PACKED=packed, PRECISION="ieee", WIDE=INTERPRETED, **tile,
    )  # fmt: skip


def _expand(run: Launches, low_rank: Tensor, matrix: Tensor, scale: Tensor, base: Tensor | None, out: Tensor) -> None:
    """Write base + low_rank matrix to the contiguous ``out`` [B, ..., features]."""
    out_rows, count = _tokens(run, out)
    (rank, features), packed = matrix.shape[-2:], matrix.dim() == 3
    tile = {"ROWS": _side(count, 64), "FEATURES": _side(features, 64), "RANK": _side(rank, 64)}
    precision, grid = "ieee" if out.dtype is torch.float32 else "tf32x3", (cdiv(count, tile["ROWS"]),)
    run.launch(
        expand_kernel, (*grid, cdiv(features, tile["FEATURES"]), 3 if packed else 1), low_rank, matrix,
        *_strided(scale), None if base is None else rows(_tokens(run, base)[0]), out, count, out_rows.shape[1],
        features, rank, *matrix.stride()[-2:], matrix.stride(0), PACKED=packed, PRECISION=precision, WIDE=INTERPRETED,
        **tile,
    )  # fmt: skip


def _outer_sums(run: Launches, products: list[tuple[Tensor, Tensor, Tensor, tuple[int, int]]], scale: Tensor) -> None:
    """(left, right, out, strides of left's and right's features in out) each: write left^T right to out.

    The rows are those of samples whose scale is not 0. ``right`` is the float32 one, of r features: a float32 factor
    that is transposed would be read 4 bytes at a time. Where out is a pair, left is [q | k | v] and right one for each
    of q and v.
    """
    rank, count, packed = products[0][1].shape[-1], products[0][0].shape[:-1].numel(), products[0][2].dim() == 3
    widest = max(left.shape[-1] for left, *_ in products) // (3 if packed else 1)
    tile = {"ROWS": _side(count, 64), "LEFT": _side(widest, 64), "RIGHT": _side(rank, 64)}
    jobs, sums = [], []
    for left, right, out, strides in products:
        lefts, rights = (left.chunk(3, -1)[::2], right) if packed else ((left,), (right,))
        features = lefts[0].shape[-1]
        tiles = cdiv(features, tile["LEFT"]) * cdiv(rank, tile["RIGHT"])
        chunk = tile["ROWS"] * cdiv(cdiv(count, tile["ROWS"]), max(1, _PROGRAMS // tiles))
        parts = run.new((len(lefts), cdiv(count, chunk), features * rank), torch.float32)
        sums.append((parts, out))
        for one, other, part in zip(lefts, rights, parts, strict=True):
            factors = (rows(_tokens(run, run.part(one, left))[0]), rows(_tokens(run, run.part(other, right))[0]))
            sizes = features, rank, *strides, chunk, tiles * len(part)
            jobs.append(Product(*factors, run.part(part, parts), *sizes))
    run.launch(
        outer_sums_kernel, (sum(job.programs for job in jobs),), tuple(jobs), *_strided(scale), count,
        count // products[0][0].shape[0], PRECISION="ieee", WIDE=INTERPRETED, **tile,
    )  # fmt: skip
    sum_chunks(run, *sums)


def _strided(scale: Tensor) -> tuple[Tensor, int]:
    """A scale [B], or 0-d for all samples, and the stride of a sample."""
    return scale, scale.stride(0) if scale.dim() else 0


def _tokens(run: Launches, tensor: Tensor) -> tuple[Tensor, int]:
    """([B, ..., D] as [B, T, D], B T)."""
    view = run.view(tensor, tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])
    return view, view.shape[0] * view.shape[1]


def _side(size: int, most: int) -> int:
    """A side of a tile: what ``tl.dot`` takes is at least 16."""
    return min(most, max(16, next_power_of_2(size)))
