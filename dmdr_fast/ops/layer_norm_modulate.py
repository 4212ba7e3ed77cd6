"""Adaptive layer norm: normalise, scale, shift."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import by, define
from dmdr_fast.ops._modulation import (
    broadcast,
    layer_norm_gradients,
    layer_norm_statistics,
    norm_options,
    shift_and_scale,
    summed,
)
from dmdr_fast.reference import Result, compute_dtype, like


class LayerNormModulate(NamedTuple):
    x: Tensor
    shift: Tensor
    scale: Tensor
    eps: float
    out_dtype: torch.dtype | None


class LayerNormModulateGrad(NamedTuple):
    grad_y: Tensor
    x: Tensor
    scale: Tensor
    mean: Tensor
    rstd: Tensor
    eps: float
    shift_dtype: torch.dtype
    need_x: bool
    need_shift_or_scale: bool


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) (1 + scale) + shift, with LN(x) = (x - mean) / sqrt(var + eps) over the last dimension.

    Args:
        x: [B, ..., D], at least 2-D, any float dtype.
        shift, scale: [D], [B, D], [B, 1, ..., D] (one per sample), x's shape, or between them: x's sizes followed by
            ones before D, such as [B, T, 1, D] for x [B, T, S, D] (one per frame). Alike for both. Any float dtype.
        eps: above 0, added to the (biased) variance.
        out_dtype: dtype of the result; None means x's.

    Returns:
        x's shape, contiguous. Statistics and arithmetic in float32 (float64 where any tensor is float64).

    Differentiable in x, shift and scale; sums over tokens and samples are in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: adaLN of DiT (arXiv 2212.09748), ``modulate(norm(x), shift, scale)``; diffusers' AdaLayerNormZero.
    """
    return _fwd.checked("layer_norm_modulate", x, shift, scale, eps, out_dtype)[0]


def _check(op: str, a: LayerNormModulate) -> None:
    check.floating(op, "x", a.x, min_dim=2)
    shift_and_scale(op, a.shift, a.scale, a.x)
    norm_options(op, a.eps, a.out_dtype)


def _results(a: LayerNormModulate):
    statistic = Result(a.x.shape[:-1], compute_dtype(a.x, a.shift, a.scale))
    return like(a.x, a.out_dtype), statistic, statistic


def _results_bwd(a: LayerNormModulateGrad):
    grad_shift, grad_scale = (like(a.scale, dtype, needed=a.need_shift_or_scale) for dtype in (a.shift_dtype, None))
    return like(a.x, needed=a.need_x), grad_shift, grad_scale


def _formula(a: LayerNormModulate) -> tuple[Tensor, Tensor, Tensor]:
    compute = compute_dtype(a.x, a.shift, a.scale)
    mean, rstd = layer_norm_statistics(a.x, a.eps, compute)
    centered = a.x.to(compute) - mean.unsqueeze(-1)
    scale, shift = (broadcast(vector, a.x).to(compute) for vector in (a.scale, a.shift))
    return centered * rstd.unsqueeze(-1) * (1 + scale) + shift, mean, rstd


def _formula_bwd(a: LayerNormModulateGrad):
    grad_x, *modulation = layer_norm_gradients(a.grad_y, a.x, a.scale, a.mean, a.rstd)
    return grad_x, *(summed(grad, a.scale, a.need_shift_or_scale) for grad in modulation)


def _statistics(a: LayerNormModulateGrad) -> dict[str, Tensor]:
    return dict(zip(("mean", "rstd"), layer_norm_statistics(a.x, a.eps, a.mean.dtype), strict=True))


_bwd = define(
    "layer_norm_modulate_bwd", LayerNormModulateGrad, "grad_x grad_shift grad_scale", _results_bwd, _formula_bwd,
    recompute=_statistics,
)  # fmt: skip
_fwd = define(
    "layer_norm_modulate_fwd", LayerNormModulate, "y mean rstd", _results, _formula,
    check=_check, backward=by(_bwd), constants=(1, 2),
)  # fmt: skip
