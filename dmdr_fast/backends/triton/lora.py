"""LoRA with one scale per sample on the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import INTERPRETED, Launches, cdiv, implements, next_power_of_2
from dmdr_fast.backends.triton.modulation import rows
from dmdr_fast.backends.triton.sums import sum_chunks
from dmdr_fast.kernels.multi_lora import expand_kernel, outer_sums_kernel, project_kernel

# Programs that sum over rows for the gradient of a matrix: three per multiprocessor of an H100.
_PROGRAMS = 384


@implements("multi_lora_fwd")
def multi_lora_fwd(run: Launches, a) -> tuple[Tensor, Tensor]:
    scale = _scale(run, a.scale, a.x)
    low_rank = _project(run, a.x, a.A, scale)
    out = run.new(a.base_out.shape, a.base_out.dtype)
    _expand(run, low_rank, a.B, scale, a.base_out, out)
    return out, low_rank


@implements("multi_lora_bwd")
def multi_lora_bwd(run: Launches, a) -> tuple[Tensor, Tensor, Tensor]:
    """What a sample of scale 0 holds is not read."""
    scale = _scale(run, a.scale, a.x)
    grad_x, grad_a, grad_b = (
        run.new(value.shape if need else (0,), value.dtype)
        for value, need in ((a.x, a.need_x), (a.A, a.need_a), (a.B, a.need_b))
    )
    if a.need_x or a.need_a:
        low_rank_grad = _project(run, a.grad, run.part(a.B.mT, a.B), scale)
    if a.need_x:
        _expand(run, low_rank_grad, run.part(a.A.mT, a.A), scale, None, grad_x)
    if a.need_a:
        _outer_sum(run, a.x, low_rank_grad, scale, grad_a, transposed=False)
    if a.need_b:
        _outer_sum(run, a.grad, a.low_rank, scale, grad_b, transposed=True)
    return grad_x, grad_a, grad_b


def _scale(run: Launches, scale: Tensor, x: Tensor) -> Tensor:
    return (scale if scale.dim() else scale.expand(x.shape[0])).contiguous()


def _project(run: Launches, x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    """scale_b (x matrix) [B, ..., r] in float32."""
    x_rows, count = _tokens(run, x)
    features, rank = matrix.shape
    low_rank = run.new((*x.shape[:-1], rank), torch.float32)
    tile = {
        "ROWS": _side(count, 64),
        "FEATURES": 64 if x.element_size() == 2 else 32,
        "RANK": _side(rank, 64),
    }
    run.launch(
        project_kernel, (cdiv(count, tile["ROWS"]), cdiv(rank, tile["RANK"])), rows(x_rows), matrix, scale, low_rank,
        count, x_rows.shape[1], features, rank, *matrix.stride(), PRECISION="ieee", WIDE=INTERPRETED, **tile,
    )  # fmt: skip
    return low_rank


def _expand(run: Launches, low_rank: Tensor, matrix: Tensor, scale: Tensor, base: Tensor | None, out: Tensor) -> None:
    """Write base + low_rank matrix to the contiguous ``out`` [B, ..., features]."""
    out_rows, count = _tokens(run, out)
    rank, features = matrix.shape
    tile = {"ROWS": _side(count, 64), "FEATURES": _side(features, 64), "RANK": _side(rank, 64)}
    run.launch(
        expand_kernel, (cdiv(count, tile["ROWS"]), cdiv(features, tile["FEATURES"])), low_rank, matrix, scale,
        None if base is None else rows(_tokens(run, base)[0]), out, count, out_rows.shape[1], features, rank,
        *matrix.stride(), PRECISION="ieee" if out.dtype is torch.float32 else "tf32x3", WIDE=INTERPRETED, **tile,
    )  # fmt: skip


def _outer_sum(run: Launches, left: Tensor, right: Tensor, scale: Tensor, out: Tensor, transposed: bool) -> None:
    """Write left^T right, or its transpose, over all rows of the samples whose scale is not 0.

    ``right`` is the float32 one: a float32 factor that is transposed would be read 4 bytes at a time.
    """
    (left, count), (right, _) = _tokens(run, left), _tokens(run, right)
    shape = left.shape[2], right.shape[2]
    tile = {"ROWS": _side(count, 64), "LEFT": _side(shape[0], 64), "RIGHT": _side(shape[1], 64)}
    tiles = cdiv(shape[0], tile["LEFT"]) * cdiv(shape[1], tile["RIGHT"])
    chunk = tile["ROWS"] * cdiv(cdiv(count, tile["ROWS"]), max(1, _PROGRAMS // tiles))
    parts = run.new((cdiv(count, chunk), *out.shape), torch.float32)
    strides = (1, shape[0]) if transposed else (shape[1], 1)
    run.launch(
        outer_sums_kernel, (tiles, parts.shape[0]), rows(left), rows(right), scale, parts, count, left.shape[1], *shape,
        *strides, chunk, PRECISION="ieee", WIDE=INTERPRETED, **tile,
    )  # fmt: skip
    sum_chunks(run, run.part(parts.view(1, parts.shape[0], -1), parts), out)


def _tokens(run: Launches, tensor: Tensor) -> tuple[Tensor, int]:
    """([B, ..., D] as [B, T, D], B T)."""
    view = run.view(tensor, tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])
    return view, view.shape[0] * view.shape[1]


def _side(size: int, most: int) -> int:
    """A side of a tile: what ``tl.dot`` takes is at least 16."""
    return min(most, max(16, next_power_of_2(size)))
