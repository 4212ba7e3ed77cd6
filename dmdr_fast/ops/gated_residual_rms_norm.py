"""The gated residual of a branch's normed output."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, by
from dmdr_fast.ops._modulation import broadcast, gated, rms_norm_statistic, weighted
from dmdr_fast.ops.rms_norm_scale import check_weight, rms_norm_scale_bwd
from dmdr_fast.reference import Result, compute_dtype, like


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


def _check(op: str, a) -> None:
    gated(op, a.x, a.h, a.gate)
    check_weight(op, a.weight, a.x)
    check.number(op, "eps", a.eps, above=0)


def _results(a):
    return like(a.x), Result(a.x.shape[:-1], compute_dtype(a.x, a.h, a.gate, a.weight))


def _formula(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(x, h, gate, weight)
    rstd = rms_norm_statistic(h, eps, compute)
    update = weighted(h.to(compute) * rstd.unsqueeze(-1), weight) * broadcast(gate, x).to(compute)
    return x.to(compute) + update, rstd


_fwd = Raw(
    "gated_residual_rms_norm_fwd", "y rstd", _results, _formula, check=_check,
    backward=by(rms_norm_scale_bwd, through="x", x="h", scale="gate"), constants=(1,),
)  # fmt: skip
