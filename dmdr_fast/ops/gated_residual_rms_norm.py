"""The gated residual of a branch's normed output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.ops._modulation import modulation
from dmdr_fast.ops.rms_norm_scale import check_weight, rms_norm_scale_bwd
from dmdr_fast.reference.registry import Result, like


class GatedResidualRMSNorm(NamedTuple):
    x: Tensor
    h: Tensor
    gate: Tensor
    weight: Tensor | None
    eps: float


def gated_residual_rms_norm(
    x: Tensor, h: Tensor, gate: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """x + gate * (h / sqrt(mean h^2 + eps) * weight), the mean over the last dimension.

    Args:
        x: [B, ..., D], at least 2-D: the residual stream. Any float dtype, as all tensors here.
        h: x's shape: a branch's output.
        gate: shapes as ``shift`` of ``layer_norm_modulate``.
        weight: [D], the norm's; None means 1.
        eps: above 0.

    Returns:
        x's shape and dtype, contiguous. Rounded once; arithmetic in float32 (float64 where any tensor is float64).

    Differentiable in x, h, gate and weight; sums over tokens and samples are in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: the way out of a branch of Z-Image's blocks (diffusers' ZImageTransformerBlock).
    """
    return _fwd.checked("gated_residual_rms_norm", x, h, gate, weight, eps)[0]


def _check(op: str, a: GatedResidualRMSNorm) -> None:
    check.floating(op, "x", a.x, min_dim=2)
    check.like(op, "h", a.h, a.x, "x")
    modulation(op, "gate", a.gate, a.x)
    check_weight(op, a.weight, a.x)
    check.number(op, "eps", a.eps, above=0)


def _save(ctx, a: GatedResidualRMSNorm, results) -> None:
    ctx.save_for_backward(a.h, a.weight, a.gate, results[1])
    ctx.eps = a.eps


def _backward(ctx, needed: GatedResidualRMSNorm, grad, _) -> dict:
    gradients = {"x": grad}
    if needed.h or needed.weight or needed.gate:
        grads = rms_norm_scale_bwd(grad, *ctx.saved_tensors, ctx.eps, needed.h, needed.weight, needed.gate)
        gradients |= dict(zip(("h", "weight", "gate"), grads, strict=True))
    return check.wanted(needed, **gradients)


def _results(a: GatedResidualRMSNorm):
    return like(a.x), Result(a.x.shape[:-1], check.compute_dtype(a.x, a.h, a.gate, a.weight))


_fwd = define(
    "gated_residual_rms_norm_fwd", GatedResidualRMSNorm, "y rstd", _results,
    check=_check, save=_save, backward=_backward, constants=(1,),
)  # fmt: skip
