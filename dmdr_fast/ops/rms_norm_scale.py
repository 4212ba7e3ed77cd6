"""An RMS norm and the scale after it."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, by
from dmdr_fast.ops._modulation import broadcast, modulation, rms_norm_statistic, summed, weighted
from dmdr_fast.reference import Result, compute_dtype, like


def rms_norm_scale(
    x: Tensor, weight: Tensor | None, scale: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight * scale, the mean over the last dimension.

    Args:
        x: [B, ..., D], at least 2-D, any float dtype, as all tensors here.
        weight: [D], the norm's; None means 1.
        scale: shapes as ``scale`` of ``layer_norm_modulate``; the factor itself, not what 1 is added to.
        eps: above 0.
        out_dtype: dtype of the result; None means x's.

    Returns:
        x's shape, contiguous. Rounded once; arithmetic in float32 (float64 where any tensor is float64).

    Differentiable in x, weight and scale; sums over tokens and samples are in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: RMSNorm (arXiv 1910.07467); the way into a branch of Z-Image's blocks (diffusers' ZImageTransformerBlock).
    """
    return _fwd.checked("rms_norm_scale", x, weight, scale, eps, out_dtype)[0]


def check_weight(op: str, weight: Tensor | None, x: Tensor) -> None:
    """The weight of a norm over x's last dimension, or None."""
    if weight is not None:
        check.shaped(op, "weight", weight, (x.shape[-1],), "D", x, "x")


def _check(op: str, a) -> None:
    check.floating(op, "x", a.x, min_dim=2)
    check_weight(op, a.weight, a.x)
    modulation(op, "scale", a.scale, a.x)
    check.number(op, "eps", a.eps, above=0)


def _results(a):
    return like(a.x, a.out_dtype), Result(a.x.shape[:-1], compute_dtype(a.x, a.weight, a.scale))


def _results_bwd(a):
    weight = a.x if a.weight is None else a.weight
    return like(a.x, needed=a.need_x), like(weight, needed=a.need_weight), like(a.scale, needed=a.need_scale)


def _formula(x: Tensor, weight: Tensor | None, scale: Tensor, eps: float, out_dtype: torch.dtype | None):
    compute = compute_dtype(x, weight, scale)
    rstd = rms_norm_statistic(x, eps, compute)
    return weighted(x.to(compute) * rstd.unsqueeze(-1), weight) * broadcast(scale, x).to(compute), rstd


def _formula_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor, rstd: Tensor, eps: float,
    need_x: bool, need_weight: bool, need_scale: bool,
):  # fmt: skip
    grad, factor = grad_y.to(rstd.dtype), broadcast(scale, x).to(rstd.dtype)
    normal = x.to(rstd.dtype) * rstd.unsqueeze(-1)
    inner = weighted(grad * factor, weight)
    return (
        rstd.unsqueeze(-1) * (inner - normal * (inner * normal).mean(-1, keepdim=True)),
        None if weight is None else summed(grad * factor * normal, weight, need_weight),
        summed(weighted(grad * normal, weight), scale, need_scale),
    )


rms_norm_scale_bwd = Raw(
    "rms_norm_scale_bwd", "grad_x grad_weight grad_scale", _results_bwd, _formula_bwd,
    recompute=lambda a: {"rstd": rms_norm_statistic(a.x, a.eps, a.rstd.dtype)},
)  # fmt: skip
_fwd = Raw(
    "rms_norm_scale_fwd", "y rstd", _results, _formula, check=_check, backward=by(rms_norm_scale_bwd), constants=(1,)
)
