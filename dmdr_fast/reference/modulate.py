"""Adaptive layer norm and gated residuals in plain PyTorch.

x and h are [B, ..., D]; shift, scale and gate are [D], [B, D] or broadcast against x as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.reference.precision import compute_dtype
from dmdr_fast.reference.registry import implements


@implements("layer_norm_modulate_fwd")
def layer_norm_modulate_fwd(a) -> tuple[Tensor, Tensor, Tensor]:
    """((x - mean) rstd (1 + scale) + shift in ``out_dtype``, mean [B, ...], rstd [B, ...])."""
    compute = compute_dtype(a.x, a.shift, a.scale)
    mean, rstd = layer_norm_statistics(a.x, a.eps, compute)
    centered = a.x.to(compute) - mean.unsqueeze(-1)
    scale, shift = (broadcast(vector, a.x).to(compute) for vector in (a.scale, a.shift))
    return centered * rstd.unsqueeze(-1) * (1 + scale) + shift, mean, rstd


@implements("layer_norm_modulate_bwd")
def layer_norm_modulate_bwd(a) -> tuple[Tensor | None, ...]:
    """Gradients of x, shift and scale."""
    grad_x, *modulation = _norm_bwd(a.grad_y, a.x, a.scale, a.mean, a.rstd)
    return grad_x, *(summed(grad, a.scale, a.need_modulation) for grad in modulation)


@implements("gated_residual_fwd")
def gated_residual_fwd(a) -> Tensor:
    """x + gate h in x's dtype."""
    compute = compute_dtype(a.x, a.h, a.gate)
    return a.x.to(compute) + broadcast(a.gate, a.x).to(compute) * a.h.to(compute)


@implements("gated_residual_bwd")
def gated_residual_bwd(a) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of h and gate."""
    return _gate_bwd(a.grad_residual.to(compute_dtype(a.grad_residual, a.h, a.gate)), a)


@implements("gated_residual_layer_norm_modulate_fwd")
def gated_residual_layer_norm_modulate_fwd(a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residual = x + gate h in x's dtype, its modulated norm, mean, rstd).

    The norm is of the rounded residual, as in two separate ops: the backward sees the same numbers.
    """
    residual = gated_residual_fwd(a).to(a.x.dtype)
    return residual, *layer_norm_modulate_fwd(a._replace(x=residual))


@implements("gated_residual_layer_norm_modulate_bwd")
def gated_residual_layer_norm_modulate_bwd(a) -> tuple[Tensor | None, ...]:
    """Gradients of x, h, gate, shift and scale."""
    compute = compute_dtype(a.residual, a.h, a.gate, a.scale)
    if a.grad_y is None:
        total = a.grad_residual.to(compute, copy=True)
        return total, *_gate_bwd(total, a), None, None
    total, *modulation = _norm_bwd(a.grad_y, a.residual, a.scale, a.mean, a.rstd)
    if a.grad_residual is not None:
        total = total + a.grad_residual.to(compute)
    return total, *_gate_bwd(total, a), *(summed(grad, a.scale, a.need_modulation) for grad in modulation)


def layer_norm_statistics(x: Tensor, eps: float, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(var + eps)) over the last dimension, in the compute dtype."""
    x = x.to(compute)
    mean = x.mean(-1)
    rstd = torch.rsqrt((x - mean.unsqueeze(-1)).square().mean(-1) + eps)
    return mean, rstd


def broadcast(vector: Tensor, x: Tensor) -> Tensor:
    """shift, scale or gate so that it broadcasts against x [B, ..., D]."""
    if vector.dim() == 2 and x.dim() > 2:
        return vector.reshape(vector.shape[0], *[1] * (x.dim() - 2), vector.shape[1])
    return vector


def summed(grad: Tensor, like: Tensor, needed: bool) -> Tensor | None:
    """``grad`` of x's shape summed to the shape of ``like``, which was broadcast: a copy; None if not needed."""
    return grad.sum_to_size(broadcast(like, grad).shape).reshape(like.shape).clone() if needed else None


def _norm_bwd(grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale in the compute dtype, the latter two not yet summed."""
    compute = mean.dtype
    grad, rstd = grad.to(compute), rstd.unsqueeze(-1)
    normal = (x.to(compute) - mean.unsqueeze(-1)) * rstd
    inner = grad * (1 + broadcast(scale, x).to(compute))
    grad_x = rstd * (inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True))
    return grad_x, grad, grad * normal


def _gate_bwd(grad: Tensor, a) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``a.h`` and ``a.gate`` from that of gate h."""
    grad_h = broadcast(a.gate, a.h).to(grad.dtype) * grad if a.need_h else None
    return grad_h, summed(grad * a.h.to(grad.dtype), a.gate, True) if a.need_gate else None
