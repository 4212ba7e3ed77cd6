"""LoRA with one scale per sample on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import INTERPRETED, cdiv, launch, next_power_of_2
from dmdr_fast.backends.triton.modulation import rows
from dmdr_fast.backends.triton.sums import sum_chunks
from dmdr_fast.kernels.multi_lora import Product, expand_kernel, outer_sums_kernel, project_kernel

# Programs that sum over rows for the gradient of a matrix: three per multiprocessor of an H100.
_PROGRAMS = 384


def multi_lora_fwd(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.multi_lora_fwd`."""
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
    grad_x, grad_a, grad_b = x.new_empty(0), A.new_empty(0), B.new_empty(0)
    if need_x or need_a:
        low_rank_grad = _project(grad, B.mT, scale)
    if need_x:
        grad_x = x.new_empty(x.shape)
        _expand(low_rank_grad, A.mT, scale, None, grad_x)
    products, rank = [], A.shape[1]
    if need_a:
        grad_a = A.new_empty(A.shape)
        products.append((x, low_rank_grad, grad_a, (rank, 1)))
    if need_b:
        grad_b = B.new_empty(B.shape)
        products.append((grad, low_rank, grad_b, (1, B.shape[1])))
    if products:
        _outer_sums(products, scale)
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
        project_kernel, (cdiv(count, tile["ROWS"]), cdiv(rank, tile["RANK"])), rows(x_rows), matrix,
        *_strided(scale), low_rank, count, x_rows.shape[1], features, rank, *matrix.stride(),
        PRECISION="ieee", WIDE=INTERPRETED, **tile,
    )  # fmt: skip
    return low_rank


def _expand(low_rank: Tensor, matrix: Tensor, scale: Tensor, base: Tensor | None, out: Tensor) -> None:
    """Write base + low_rank matrix to the contiguous ``out`` [B, ..., features]."""
    out_rows, count = _tokens(out)
    rank, features = matrix.shape
    tile = {"ROWS": _side(count, 64), "FEATURES": _side(features, 64), "RANK": _side(rank, 64)}
    launch(
        expand_kernel, (cdiv(count, tile["ROWS"]), cdiv(features, tile["FEATURES"])), low_rank, matrix,
        *_strided(scale), None if base is None else rows(_tokens(base)[0]), out, count, out_rows.shape[1], features,
        rank, *matrix.stride(), PRECISION="ieee" if out.dtype is torch.float32 else "tf32x3", WIDE=INTERPRETED, **tile,
    )  # fmt: skip


def _outer_sums(products: list[tuple[Tensor, Tensor, Tensor, tuple[int, int]]], scale: Tensor) -> None:
    """(left, right, out, strides of left's and right's features in out) each: write left^T right to out.

    The rows are those of samples whose scale is not 0. ``right`` is the float32 one, of r features: a float32 factor
    that is transposed would be read 4 bytes at a time.
    """
    rank = products[0][1].shape[-1]
    count = products[0][0].shape[:-1].numel()
    tile = {
        "ROWS": _side(count, 64),
        "LEFT": _side(max(left.shape[-1] for left, *_ in products), 64),
        "RIGHT": _side(rank, 64),
    }
    jobs, sums = [], []
    for left, right, out, strides in products:
        (left, _), (right, _) = _tokens(left), _tokens(right)
        features = left.shape[2]
        tiles = cdiv(features, tile["LEFT"]) * cdiv(rank, tile["RIGHT"])
        chunk = tile["ROWS"] * cdiv(cdiv(count, tile["ROWS"]), max(1, _PROGRAMS // tiles))
        parts = right.new_empty((cdiv(count, chunk), features * rank), dtype=torch.float32)
        programs = tiles * parts.shape[0]
        jobs.append(Product(rows(left), rows(right), parts, features, rank, *strides, chunk, programs))
        sums.append((parts[None], out))
    launch(
        outer_sums_kernel, (sum(job.programs for job in jobs),), tuple(jobs), *_strided(scale), count, left.shape[1],
        PRECISION="ieee", WIDE=INTERPRETED, **tile,
    )  # fmt: skip
    sum_chunks(*sums)


def _strided(scale: Tensor) -> tuple[Tensor, int]:
    """A scale [B], or 0-d for all samples, and the stride of a sample."""
    return scale, scale.stride(0) if scale.dim() else 0


def _tokens(tensor: Tensor) -> tuple[Tensor, int]:
    """([B, ..., D] as [B, T, D], copied only where the strides of the middle do not merge; B T)."""
    tensor = tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)
    return tensor, tensor.shape[0] * tensor.shape[1]


def _side(size: int, most: int) -> int:
    """A side of a tile: what ``tl.dot`` takes is at least 16."""
    return min(most, max(16, next_power_of_2(size)))
