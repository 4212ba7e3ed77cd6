"""Adaptive layer norm: normalise, scale, shift."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmdr_fast import reference
from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.ops._modulation import norm_options, shift_and_scale
from dmdr_fast.reference.registry import Result, like


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
    need_modulation: bool


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


def _save(ctx, a: LayerNormModulate, results) -> None:
    _, mean, rstd = results
    ctx.save_for_backward(a.x, a.scale, mean, rstd)
    ctx.options = a.eps, a.shift.dtype


def _backward(ctx, needed: LayerNormModulate, grad, *_) -> dict:
    grads = _bwd(grad, *ctx.saved_tensors, *ctx.options, needed.x, needed.shift or needed.scale)
    return check.wanted(needed, x=grads[0], shift=grads[1], scale=grads[2])


def _results(a: LayerNormModulate):
    statistic = Result(a.x.shape[:-1], check.compute_dtype(a.x, a.shift, a.scale))
    return like(a.x, a.out_dtype), statistic, statistic


def _results_bwd(a: LayerNormModulateGrad):
    grad_shift, grad_scale = (like(a.scale, dtype, needed=a.need_modulation) for dtype in (a.shift_dtype, None))
    return like(a.x, needed=a.need_x), grad_shift, grad_scale


def _formula_bwd(a: LayerNormModulateGrad):
    """The statistics are functions of x."""
    mean, rstd = reference.layer_norm_statistics(a.x, a.eps, a.mean.dtype)
    return reference.run("layer_norm_modulate_bwd", a._replace(mean=mean, rstd=rstd))


_bwd = define(
    "layer_norm_modulate_bwd", LayerNormModulateGrad, "grad_x grad_shift grad_scale", _results_bwd, formula=_formula_bwd
)
_fwd = define(
    "layer_norm_modulate_fwd", LayerNormModulate, "y mean rstd", _results,
    check=_check, save=_save, backward=_backward, constants=(1, 2),
)  # fmt: skip
