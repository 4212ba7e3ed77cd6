"""Adaptive layer norm and gated residuals in plain PyTorch.

x and h are [B, T, D]; shift, scale and gate are [1 or B, 1 or T, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.reference.precision import compute_dtype


def layer_norm_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """((x - mean) rstd (1 + scale) + shift in ``out_dtype``, mean [B, T], rstd [B, T])."""
    compute = compute_dtype(x, shift, scale)
    x = x.to(compute)
    mean = x.mean(-1)
    centered = x - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centered.square().mean(-1) + eps)
    y = centered * rstd.unsqueeze(-1) * (1 + scale.to(compute)) + shift.to(compute)
    return y.to(out_dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def layer_norm_modulate_bwd(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift_dtype: torch.dtype,
    need_x: bool,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale; one that is not needed comes back as an empty [0]."""
    grad_x, grad_shift, grad_scale = _norm_bwd(grad, x, scale, mean, rstd)
    return (
        grad_x.to(x.dtype).contiguous() if need_x else x.new_empty(0),
        _summed(grad_shift, scale, shift_dtype, need_modulation),
        _summed(grad_scale, scale, scale.dtype, need_modulation),
    )


def gated_residual_fwd(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h in x's dtype."""
    compute = compute_dtype(x, h, gate)
    return (x.to(compute) + gate.to(compute) * h.to(compute)).to(x.dtype).contiguous()


def gated_residual_bwd(grad: Tensor, h: Tensor, gate: Tensor, need_h: bool, need_gate: bool) -> tuple[Tensor, Tensor]:
    """Gradients of h and gate; one that is not needed comes back as an empty [0]."""
    return _gate_bwd(grad.to(compute_dtype(grad, h, gate)), h, gate, need_h, need_gate)


def gated_residual_layer_norm_modulate_fwd(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residual = x + gate h in x's dtype, its modulated norm, mean, rstd).

    The norm is of the rounded residual, as in two separate ops: the backward sees the same numbers.
    """
    residual = gated_residual_fwd(x, h, gate)
    return residual, *layer_norm_modulate_fwd(residual, shift, scale, eps, out_dtype)


def gated_residual_layer_norm_modulate_bwd(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    residual: Tensor,
    h: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift_dtype: torch.dtype,
    need_h: bool,
    need_gate: bool,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, h, gate, shift and scale; x's always, others that are not needed as an empty [0]."""
    compute = compute_dtype(residual, h, gate, scale)
    if grad_y is None:
        total = grad_residual.to(compute)
        grad_shift = grad_scale = torch.zeros_like(total)
    else:
        total, grad_shift, grad_scale = _norm_bwd(grad_y, residual, scale, mean, rstd)
        if grad_residual is not None:
            total = total + grad_residual.to(compute)
    return (
        total.to(residual.dtype, copy=True).contiguous(),
        *_gate_bwd(total, h, gate, need_h, need_gate),
        _summed(grad_shift, scale, shift_dtype, need_modulation),
        _summed(grad_scale, scale, scale.dtype, need_modulation),
    )


def _norm_bwd(grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale in the compute dtype, the latter two not yet summed."""
    compute = mean.dtype
    grad, rstd = grad.to(compute), rstd.unsqueeze(-1)
    normal = (x.to(compute) - mean.unsqueeze(-1)) * rstd
    inner = grad * (1 + scale.to(compute))
    grad_x = rstd * (inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True))
    return grad_x, grad, grad * normal


def _gate_bwd(grad: Tensor, h: Tensor, gate: Tensor, need_h: bool, need_gate: bool) -> tuple[Tensor, Tensor]:
    grad_h = (gate.to(grad.dtype) * grad).to(h.dtype).contiguous() if need_h else h.new_empty(0)
    return grad_h, _summed(grad * h.to(grad.dtype) if need_gate else grad, gate, gate.dtype, need_gate)


def _summed(grad: Tensor, like: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
    """``grad`` [B, T, D] summed to the shape of ``like``, which was broadcast, in ``dtype``."""
    if not needed:
        return like.new_empty(0, dtype=dtype)
    dims = [dim for dim in (0, 1) if like.shape[dim] == 1 and grad.shape[dim] != 1]
    return (grad.sum(dims, keepdim=True) if dims else grad).to(dtype, copy=True).contiguous()
