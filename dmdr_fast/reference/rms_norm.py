"""RMS norms with a scale, and the gated residual of one, in plain PyTorch.

x and h are [B, ..., D], weight [D]; scale and gate are [D], [B, D] or broadcast against x as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.reference.modulate import broadcast, summed
from dmdr_fast.reference.precision import compute_dtype
from dmdr_fast.reference.registry import implements


@implements("rms_norm_scale_fwd")
def rms_norm_scale_fwd(a) -> tuple[Tensor, Tensor]:
    """(x rstd weight scale in ``out_dtype``, rstd [B, ...])."""
    compute = compute_dtype(a.x, a.weight, a.scale)
    rstd = rms_norm_statistic(a.x, a.eps, compute)
    return _weighted(a.x.to(compute) * rstd.unsqueeze(-1), a.weight) * broadcast(a.scale, a.x).to(compute), rstd


@implements("rms_norm_scale_bwd")
def rms_norm_scale_bwd(a) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and scale.

    With h for x and gate for scale those of ``gated_residual_rms_norm``, whose gradient of x is ``grad_y``.
    """
    compute = a.rstd.dtype
    grad, rstd = a.grad_y.to(compute), a.rstd.unsqueeze(-1)
    normal, scale = a.x.to(compute) * rstd, broadcast(a.scale, a.x).to(compute)
    inner = _weighted(grad * scale, a.weight)
    return (
        rstd * (inner - normal * (inner * normal).mean(-1, keepdim=True)),
        summed(grad * scale * normal, a.weight, a.need_weight),
        summed(_weighted(grad * normal, a.weight), a.scale, a.need_scale),
    )


@implements("gated_residual_rms_norm_fwd")
def gated_residual_rms_norm_fwd(a) -> tuple[Tensor, Tensor]:
    """(x + gate h rstd weight in x's dtype, rstd [B, ...])."""
    compute = compute_dtype(a.x, a.h, a.gate, a.weight)
    rstd = rms_norm_statistic(a.h, a.eps, compute)
    update = _weighted(a.h.to(compute) * rstd.unsqueeze(-1), a.weight) * broadcast(a.gate, a.x).to(compute)
    return a.x.to(compute) + update, rstd


def rms_norm_statistic(x: Tensor, eps: float, compute: torch.dtype) -> Tensor:
    """1 / sqrt(mean x^2 + eps) over the last dimension, in the compute dtype."""
    return torch.rsqrt(x.to(compute).square().mean(-1) + eps)


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight.to(x.dtype)
