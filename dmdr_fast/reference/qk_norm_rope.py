"""RMS norm and rotary embedding of queries and keys in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.reference.precision import compute_dtype
from dmdr_fast.reference.registry import implements
from dmdr_fast.reference.rms_norm import rms_norm_statistic


@implements("qk_norm_rope_fwd")
def qk_norm_rope_fwd(a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k normalised and rotated, their reciprocal root mean squares [B, T, heads]).

    q, k [B, T, heads, D]; weights [D]; cos, sin [T, D] or [B, T, D].
    """
    compute = compute_dtype(a.q, a.k, a.q_weight, a.k_weight, a.cos, a.sin)
    q_out, q_rstd = _forward(a, a.q, a.q_weight, compute)
    k_out, k_rstd = _forward(a, a.k, a.k_weight, compute)
    return q_out, k_out, q_rstd, k_rstd


@implements("qk_norm_rope_bwd")
def qk_norm_rope_bwd(a) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and the weights."""
    grad_q, grad_q_weight = _backward(a, a.grad_q, a.q, a.q_weight, a.q_rstd)
    grad_k, grad_k_weight = _backward(a, a.grad_k, a.k, a.k_weight, a.k_rstd)
    return grad_q, grad_k, grad_q_weight, grad_k_weight


def _forward(a, x: Tensor, weight: Tensor | None, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    rstd = rms_norm_statistic(x, a.eps, compute)
    y = x.to(compute) * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(compute)
    if a.cos is not None:
        cos, sin = (table.to(compute).unsqueeze(-2) for table in (a.cos, a.sin))
        y = y * cos + _rotate(y, a.interleaved) * sin
    return y.to(x.dtype), rstd


def _backward(a, grad: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None
    compute = rstd.dtype
    grad, rstd = grad.to(compute), rstd.unsqueeze(-1)
    if a.cos is not None:
        # The rotation's matrix is skew: its transpose is its negative.
        cos, sin = (table.to(compute).unsqueeze(-2) for table in (a.cos, a.sin))
        grad = grad * cos - _rotate(grad * sin, a.interleaved)
    normal = x.to(compute) * rstd
    summed = a.need_weights and weight is not None
    weight_grad = (grad * normal).sum((0, 1, 2)) if summed else None
    if weight is not None:
        grad = grad * weight.to(compute)
    return rstd * (grad - normal * (grad * normal).mean(-1, keepdim=True)), weight_grad


def _rotate(y: Tensor, interleaved: bool) -> Tensor:
    """(y0, y1) -> (-y1, y0) over neighbouring pairs, or over the two halves."""
    if interleaved:
        return torch.stack((-y[..., 1::2], y[..., 0::2]), -1).flatten(-2)
    first, second = y.chunk(2, -1)
    return torch.cat((-second, first), -1)
