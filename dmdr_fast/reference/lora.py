"""LoRA with one scale per sample in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.reference.precision import compute_dtype, per_sample


def multi_lora_fwd(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(base_out + low_rank B in base_out's dtype, low_rank = scale_b (x A) in the compute dtype)."""
    compute = compute_dtype(x, base_out, A, B)
    low_rank = _scaled(x.to(compute) @ A.to(compute), scale)
    out = base_out.to(compute) + low_rank @ B.to(compute)
    return out.to(base_out.dtype).contiguous(), low_rank


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
    """Gradients of x, A and B; one that is not needed comes back as an empty [0]."""
    compute = low_rank.dtype
    grad = grad.to(compute)
    grad_x, grad_a, grad_b = x.new_empty(0), A.new_empty(0), B.new_empty(0)
    if need_x or need_a:
        low_rank_grad = _scaled(grad @ B.to(compute).mT, scale)
    if need_x:
        grad_x = (low_rank_grad @ A.to(compute).mT).to(x.dtype).contiguous()
    if need_a:
        grad_a = (x.to(compute).flatten(0, -2).mT @ low_rank_grad.flatten(0, -2)).to(A.dtype).contiguous()
    if need_b:
        grad_b = (low_rank.flatten(0, -2).mT @ grad.flatten(0, -2)).to(B.dtype).contiguous()
    return grad_x, grad_a, grad_b


def _scaled(low_rank: Tensor, scale: Tensor) -> Tensor:
    """scale_b low_rank, exactly 0 where the scale is, also for a row that is not finite."""
    scale = per_sample(scale, low_rank)
    return torch.where(scale != 0, scale * low_rank, 0)
