"""Adaptive layer norm: normalise, scale, shift."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, by
from dmdr_fast.ops._modulation import broadcast, layer_norm_gradients, layer_norm_statistics, shift_and_scale, summed
from dmdr_fast.reference import Result, compute_dtype, like


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


def _check(op: str, a) -> None:
    check.floating(op, "x", a.x, min_dim=2)
    shift_and_scale(op, a.shift, a.scale, a.x)
    check.number(op, "eps", a.eps, above=0)


def _results(a):
    statistic = Result(a.x.shape[:-1], compute_dtype(a.x, a.shift, a.scale))
    return like(a.x, a.out_dtype), statistic, statistic


def _results_bwd(a):
    grad_shift, grad_scale = (like(a.scale, dtype, needed=a.need_shift_or_scale) for dtype in (a.shift_dtype, None))
    return like(a.x, needed=a.need_x), grad_shift, grad_scale


def formula(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    compute = compute_dtype(x, shift, scale)
    mean, rstd = layer_norm_statistics(x, eps, compute).values()
    centered = x.to(compute) - mean.unsqueeze(-1)
    scale, shift = (broadcast(vector, x).to(compute) for vector in (scale, shift))
    return centered * rstd.unsqueeze(-1) * (1 + scale) + shift, mean, rstd


def _formula_bwd(
    grad_y: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, eps: float, shift_dtype: torch.dtype,
    need_x: bool, need_shift_or_scale: bool,
):  # fmt: skip
    grad_x, *vectors = layer_norm_gradients(grad_y, x, scale, mean, rstd)
    return grad_x, *(summed(grad, scale, need_shift_or_scale) for grad in vectors)


_bwd = Raw(
    "layer_norm_modulate_bwd", "grad_x grad_shift grad_scale", _results_bwd, _formula_bwd,
    recompute=lambda a: layer_norm_statistics(a.x, a.eps, a.mean.dtype),
)  # fmt: skip
_fwd = Raw(
    "layer_norm_modulate_fwd", "y mean rstd", _results, formula, check=_check, backward=by(_bwd), constants=(1, 2)
)
