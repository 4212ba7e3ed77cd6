"""LoRA with one scale per sample on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import INTERPRETED, cdiv, launch, next_power_of_2
from dmdr_fast.backends.triton.modulation import rows
from dmdr_fast.backends.triton.sums import sum_chunks
from dmdr_fast.kernels.multi_lora import expand_kernel, outer_sums_kernel, project_kernel

# Programs that sum over rows for the gradient of a matrix: three per multiprocessor of an H100.
_PROGRAMS = 384


def multi_lora_fwd(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.multi_lora_fwd`."""
    scale = scale.contiguous()
    low_rank = _project(x, A, scale)
    out = base_out.new_empty(base_out.shape)
    _expand(low_rank, B, scale, base_out, out)
    return out, low_rank


def multi_lora_bwd(
    grad: Tensor,
    x: Tensor,
    low_rank: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.multi_lora_bwd`; what a sample of scale 0 holds is not read."""
    scale = scale.contiguous()
    grad_x, grad_a, grad_b = x.new_empty(0), A.new_empty(0), B.new_empty(0)
    if need_x or need_a:
        low_rank_grad = _project(grad, B.mT, scale)
    if need_x:
        grad_x = x.new_empty(x.shape)
        _expand(low_rank_grad, A.mT, scale, None, grad_x)
    if need_a:
        grad_a = A.new_empty(A.shape)
        _outer_sum(x, low_rank_grad, scale, grad_a, transposed=False)
    if need_b:
        grad_b = B.new_empty(B.shape)
        _outer_sum(grad, low_rank, scale, grad_b, transposed=True)
    return grad_x, grad_a, grad_b


def _project(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    """scale_b (x matrix) [B, ..., r] in float32."""
    x_rows, count = _tokens(x)
    features, rank = matrix.shape
    low_rank = x.new_empty((*x.shape[:-1], rank), dtype=torch.float32)
    tile = {
        "ROWS": _side(count, 64),
        "FEATURES": 64 if x.element_size() == 2 else 32,
        "RANK": _side(rank, 64),
    }
    launch(
        project_kernel, (cdiv(count, tile["ROWS"]), cdiv(rank, tile["RANK"])), rows(x_rows), matrix, scale, low_rank,
        count, x_rows.shape[1], features, rank, *matrix.stride(), PRECISION="ieee", WIDE=INTERPRETED, **tile,
    )  # fmt: skip
    return low_rank


def _expand(low_rank: Tensor, matrix: Tensor, scale: Tensor, base: Tensor | None, out: Tensor) -> None:
    """Write base + low_rank matrix to the contiguous ``out`` [B, ..., features]."""
    out_rows, count = _tokens(out)
    rank, features = matrix.shape
    tile = {"ROWS": _side(count, 64), "FEATURES": _side(features, 64), "RANK": _side(rank, 64)}
    launch(
        expand_kernel, (cdiv(count, tile["ROWS"]), cdiv(features, tile["FEATURES"])), low_rank, matrix, scale,
        None if base is None else rows(_tokens(base)[0]), out, count, out_rows.shape[1], features, rank,
        *matrix.stride(), PRECISION="ieee" if out.dtype is torch.float32 else "tf32x3", WIDE=INTERPRETED, **tile,
    )  # fmt: skip


def _outer_sum(left: Tensor, right: Tensor, scale: Tensor, out: Tensor, transposed: bool) -> None:
    """Write left^T right, or its transpose, over all rows of the samples whose scale is not 0.

    ``right`` is the float32 one: a float32 factor that is transposed would be read 4 bytes at a time.
    """
    (left, count), (right, _) = _tokens(left), _tokens(right)
    shape = left.shape[2], right.shape[2]
    tile = {"ROWS": _side(count, 64), "LEFT": _side(shape[0], 64), "RIGHT": _side(shape[1], 64)}
    tiles = cdiv(shape[0], tile["LEFT"]) * cdiv(shape[1], tile["RIGHT"])
    chunk = tile["ROWS"] * cdiv(cdiv(count, tile["ROWS"]), max(1, _PROGRAMS // tiles))
    parts = right.new_empty((cdiv(count, chunk), *out.shape), dtype=torch.float32)
    strides = (1, shape[0]) if transposed else (shape[1], 1)
    launch(
        outer_sums_kernel, (tiles, parts.shape[0]), rows(left), rows(right), scale, parts, count, left.shape[1], *shape,
        *strides, chunk, PRECISION="ieee", WIDE=INTERPRETED, **tile,
    )  # fmt: skip
    sum_chunks(parts.view(1, parts.shape[0], -1), out)


def _tokens(tensor: Tensor) -> tuple[Tensor, int]:
    """([B, ..., D] as [B, T, D], copied only where the strides of the middle do not merge; B T)."""
    tensor = tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)
    return tensor, tensor.shape[0] * tensor.shape[1]


def _side(size: int, most: int) -> int:
    """A side of a tile: what ``tl.dot`` takes is at least 16."""
    return min(most, max(16, next_power_of_2(size)))
