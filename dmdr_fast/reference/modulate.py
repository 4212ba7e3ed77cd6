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
    y = centered * rstd.unsqueeze(-1) * (1 + scale) + shift
    return y.to(a.out_dtype or a.x.dtype).contiguous(), mean, rstd


@implements("layer_norm_modulate_bwd")
def layer_norm_modulate_bwd(a) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale; one that is not needed comes back as an empty [0]."""
    grad_x, grad_shift, grad_scale = _norm_bwd(a.grad, a.x, a.scale, a.mean, a.rstd)
    return (
        grad_x.to(a.x.dtype).contiguous() if a.need_x else a.x.new_empty(0),
        summed(grad_shift, a.scale, a.shift_dtype, a.need_modulation),
        summed(grad_scale, a.scale, a.scale.dtype, a.need_modulation),
    )


@implements("gated_residual_fwd")
def gated_residual_fwd(a) -> Tensor:
    """x + gate h in x's dtype."""
    compute = compute_dtype(a.x, a.h, a.gate)
    residual = a.x.to(compute) + broadcast(a.gate, a.x).to(compute) * a.h.to(compute)
    return residual.to(a.x.dtype).contiguous()


@implements("gated_residual_bwd")
def gated_residual_bwd(a) -> tuple[Tensor, Tensor]:
    """Gradients of h and gate; one that is not needed comes back as an empty [0]."""
    return _gate_bwd(a.grad.to(compute_dtype(a.grad, a.h, a.gate)), a)


@implements("gated_residual_layer_norm_modulate_fwd")
def gated_residual_layer_norm_modulate_fwd(a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residual = x + gate h in x's dtype, its modulated norm, mean, rstd).

    The norm is of the rounded residual, as in two separate ops: the backward sees the same numbers.
    """
    residual = gated_residual_fwd(a)
    return residual, *layer_norm_modulate_fwd(a._replace(x=residual))


@implements("gated_residual_layer_norm_modulate_bwd")
def gated_residual_layer_norm_modulate_bwd(a) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, h, gate, shift and scale; x's always, others that are not needed as an empty [0]."""
    compute = compute_dtype(a.residual, a.h, a.gate, a.scale)
    if a.grad_y is None:
        total = a.grad_residual.to(compute)
        grad_shift = grad_scale = torch.zeros_like(total)
    else:
        total, grad_shift, grad_scale = _norm_bwd(a.grad_y, a.residual, a.scale, a.mean, a.rstd)
        if a.grad_residual is not None:
            total = total + a.grad_residual.to(compute)
    return (
        total.to(a.residual.dtype, copy=True).contiguous(),
        *_gate_bwd(total, a),
        summed(grad_shift, a.scale, a.shift_dtype, a.need_modulation),
        summed(grad_scale, a.scale, a.scale.dtype, a.need_modulation),
    )


def layer_norm_statistics(x: Tensor, eps: float, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(var + eps)) over the last dimension, contiguous, in the compute dtype."""
    x = x.to(compute)
    mean = x.mean(-1)
    rstd = torch.rsqrt((x - mean.unsqueeze(-1)).square().mean(-1) + eps)
    return mean.contiguous(), rstd.contiguous()


def broadcast(vector: Tensor, x: Tensor) -> Tensor:
    """shift, scale or gate so that it broadcasts against x [B, ..., D]."""
    if vector.dim() == 2 and x.dim() > 2:
        return vector.reshape(vector.shape[0], *[1] * (x.dim() - 2), vector.shape[1])
    return vector


def summed(grad: Tensor, like: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
    """``grad`` of x's shape summed to the shape of ``like``, which was broadcast, in ``dtype``."""
    if not needed:
        return like.new_empty(0, dtype=dtype)
    over = broadcast(like, grad)
    return grad.sum_to_size(over.shape).reshape(like.shape).to(dtype, copy=True).contiguous()


def _norm_bwd(grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale in the compute dtype, the latter two not yet summed."""
    compute = mean.dtype
    grad, rstd = grad.to(compute), rstd.unsqueeze(-1)
    normal = (x.to(compute) - mean.unsqueeze(-1)) * rstd
    inner = grad * (1 + broadcast(scale, x).to(compute))
    grad_x = rstd * (inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True))
    return grad_x, grad, grad * normal


def _gate_bwd(grad: Tensor, a) -> tuple[Tensor, Tensor]:
    """Gradients of ``a.h`` and ``a.gate`` from that of gate h."""
    gate = broadcast(a.gate, a.h).to(grad.dtype)
    grad_h = (gate * grad).to(a.h.dtype).contiguous() if a.need_h else a.h.new_empty(0)
    return grad_h, summed(grad * a.h.to(grad.dtype) if a.need_gate else grad, a.gate, a.gate.dtype, a.need_gate)
