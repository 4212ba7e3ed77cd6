"""LoRA with one scale per sample on the kernels of csrc/."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.backends.native.library import Calls, Library, implements
from dmdr_fast.backends.views import Strided


def _refuses(library: Library, a) -> str | None:
    in_features, rank = a.A.shape
    return None if in_features and rank else f"it has nothing to multiply: A is [{in_features}, {rank}]"


@implements("multi_lora_fwd", refuses=_refuses)
def multi_lora_fwd(run: Calls, a) -> tuple[Tensor, Tensor]:
    out = run.new(a.base_out.shape, a.base_out.dtype)
    low_rank = run.new((*a.x.shape[:-1], a.A.shape[1]), torch.float32)
    run.call(
        "multi_lora_fwd", "dmdr_multi_lora_args", **_sizes(a), x=_rows(run, a.x), base=_rows(run, a.base_out),
        out=_rows(run, out), A=_matrix(a.A), B=_matrix(a.B), scale=_scale(run, a), low_rank=low_rank,
        workspace=run.workspace("multi_lora", *_sizes(a).values(), 0),
    )  # fmt: skip
    return out, low_rank


@implements("multi_lora_bwd", refuses=_refuses)
def multi_lora_bwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor]:
    """What a sample of scale 0 holds is not read."""
    grad_x = run.new(a.x.shape if a.need_x else (0,), a.x.dtype)
    grad_a = run.new(a.A.shape if a.need_a else (0,), torch.float32)
    grad_b = run.new(a.B.shape if a.need_b else (0,), torch.float32)
    run.call(
        "multi_lora_bwd", "dmdr_multi_lora_args", **_sizes(a), x=_rows(run, a.x), A=_matrix(a.A), B=_matrix(a.B),
        grad=_rows(run, a.grad), grad_x=_rows(run, grad_x) if a.need_x else None, scale=_scale(run, a),
        low_rank=a.low_rank.contiguous(), grad_a=grad_a if a.need_a else None, grad_b=grad_b if a.need_b else None,
        workspace=run.workspace("multi_lora", *_sizes(a).values(), 1),
    )  # fmt: skip
    return grad_x, grad_a.to(a.A.dtype), grad_b.to(a.B.dtype)


def _sizes(a) -> dict[str, int]:
    rows = math.prod(a.x.shape[1:-1])
    (in_features, rank), out_features = a.A.shape, a.B.shape[1]
    return {
        "batch": a.x.shape[0], "rows": rows, "in_features": in_features, "rank": rank, "out_features": out_features,
    }  # fmt: skip


def _scale(run: Calls, a) -> Tensor:
    return run.scalars(a.scale if a.scale.dim() else a.scale.expand(a.x.shape[0]))


def _rows(run: Calls, tensor: Tensor) -> Strided:
    """[B, ..., D] as [B, rows, D]; copied only where the strides of the middle dimensions do not merge."""
    rows = run.view(tensor, tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])
    return Strided(
        rows, [0 if size == 1 else step for size, step in zip(rows.shape[:2], rows.stride()[:2], strict=True)]
    )


def _matrix(matrix: Tensor) -> Strided:
    if matrix.stride(1) != 1 and matrix.shape[1] != 1:
        matrix = matrix.contiguous()
    return Strided(matrix, (matrix.stride(0),))
