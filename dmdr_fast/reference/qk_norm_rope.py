"""RMS norm and rotary embedding of queries and keys in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.reference.precision import compute_dtype


def qk_norm_rope_fwd(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k normalised and rotated, their reciprocal root mean squares [B, T, heads]).

    q, k [B, T, heads, D]; weights [D]; cos, sin [1 or B, T, D].
    """
    compute = compute_dtype(q, k, q_weight, k_weight, cos, sin)
    q_out, q_rstd = _forward(q, q_weight, cos, sin, eps, interleaved, compute)
    k_out, k_rstd = _forward(k, k_weight, cos, sin, eps, interleaved, compute)
    return q_out, k_out, q_rstd, k_rstd


def qk_norm_rope_bwd(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    interleaved: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and the weights; an empty [0] for one not needed or whose output got none."""
    dq, dq_weight = _backward(grad_q, q, q_weight, cos, sin, q_rstd, interleaved, need_weights)
    dk, dk_weight = _backward(grad_k, k, k_weight, cos, sin, k_rstd, interleaved, need_weights)
    return dq, dk, dq_weight, dk_weight


def _forward(x, weight, cos, sin, eps, interleaved, compute) -> tuple[Tensor, Tensor]:
    wide = x.to(compute)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(compute)
    if cos is not None:
        y = y * cos.to(compute).unsqueeze(2) + _rotate(y, interleaved) * sin.to(compute).unsqueeze(2)
    return y.to(x.dtype).contiguous(), rstd.contiguous()


def _backward(grad, x, weight, cos, sin, rstd, interleaved, need_weight) -> tuple[Tensor, Tensor]:
    no_weight = x.new_empty(0, dtype=x.dtype if weight is None else weight.dtype)
    if grad is None:
        return x.new_empty(0), no_weight
    compute = rstd.dtype
    grad, rstd = grad.to(compute), rstd.unsqueeze(-1)
    if cos is not None:
        # The rotation's matrix is skew: its transpose is its negative.
        grad = grad * cos.to(compute).unsqueeze(2) - _rotate(grad * sin.to(compute).unsqueeze(2), interleaved)
    normal = x.to(compute) * rstd
    weight_grad = (grad * normal).sum((0, 1, 2)).to(weight.dtype) if need_weight and weight is not None else no_weight
    if weight is not None:
        grad = grad * weight.to(compute)
    dx = rstd * (grad - normal * (grad * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous(), weight_grad


def _rotate(y: Tensor, interleaved: bool) -> Tensor:
    """(y0, y1) -> (-y1, y0) over neighbouring pairs, or over the two halves."""
    if interleaved:
        return torch.stack((-y[..., 1::2], y[..., 0::2]), -1).flatten(-2)
    first, second = y.chunk(2, -1)
    return torch.cat((-second, first), -1)
