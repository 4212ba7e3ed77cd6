"""LoRA with one scale per sample in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.reference.precision import compute_dtype, per_sample
from dmdr_fast.reference.registry import implements


@implements("multi_lora_fwd")
def multi_lora_fwd(a) -> tuple[Tensor, Tensor]:
    """(base_out + low_rank B in base_out's dtype, low_rank = scale_b (x A) in the compute dtype)."""
    compute = compute_dtype(a.x, a.base_out, a.A, a.B)
    projected = low_rank(a.x, a.A, a.scale, compute)
    return a.base_out.to(compute) + projected @ a.B.to(compute), projected


@implements("multi_lora_bwd")
def multi_lora_bwd(a) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A and B."""
    compute = a.low_rank.dtype
    grad = a.grad.to(compute)
    if a.need_x or a.need_a:
        low_rank_grad = _scaled(grad @ a.B.to(compute).mT, a.scale)
    return (
        low_rank_grad @ a.A.to(compute).mT if a.need_x else None,
        a.x.to(compute).flatten(0, -2).mT @ low_rank_grad.flatten(0, -2) if a.need_a else None,
        a.low_rank.flatten(0, -2).mT @ grad.flatten(0, -2) if a.need_b else None,
    )


def low_rank(x: Tensor, A: Tensor, scale: Tensor, compute: torch.dtype) -> Tensor:
    """scale_b (x A) [B, ..., r] in the compute dtype."""
    return _scaled(x.to(compute) @ A.to(compute), scale)


def _scaled(low_rank: Tensor, scale: Tensor) -> Tensor:
    """scale_b low_rank, exactly 0 where the scale is, also for a row that is not finite."""
    scale = per_sample(scale, low_rank) if scale.dim() else scale
    return torch.where(scale != 0, scale * low_rank, 0)
