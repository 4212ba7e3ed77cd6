"""The gated residual and the adaptive norm that follows it, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmdr_fast import reference
from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.ops._modulation import modulation, shift_and_scale


class GatedResidualLayerNormModulate(NamedTuple):
    x: Tensor
    h: Tensor
    gate: Tensor
    shift: Tensor
    scale: Tensor
    eps: float
    out_dtype: torch.dtype | None


class GatedResidualLayerNormModulateGrad(NamedTuple):
    grad_residual: Tensor | None
    grad_y: Tensor | None
    residual: Tensor
    h: Tensor
    gate: Tensor
    scale: Tensor
    mean: Tensor
    rstd: Tensor
    eps: float
    shift_dtype: torch.dtype
    need_h: bool
    need_gate: bool
    need_modulation: bool


def gated_residual_layer_norm_modulate(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(r, LN(r) (1 + scale) + shift) with r = x + gate h: the end of one branch and the start of the next.

    The norm is of r as rounded to x's dtype, so the result is that of :func:`gated_residual` followed by
    :func:`layer_norm_modulate`, read and written once.

    Args:
        x, h, gate: as in :func:`gated_residual`.
        shift, scale, eps, out_dtype: as in :func:`layer_norm_modulate`; out_dtype is that of the second
            result.

    Returns:
        (r in x's dtype, modulated), both of x's shape and contiguous.

    Differentiable in all five tensors.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: DiT (arXiv 2212.09748), two halves of its block.
    """
    op = "gated_residual_layer_norm_modulate"
    return _fwd.checked(op, x, h, gate, shift, scale, eps, out_dtype)[:2]


def _check(op: str, a: GatedResidualLayerNormModulate) -> None:
    check.floating(op, "x", a.x, min_dim=2)
    check.like(op, "h", a.h, a.x, "x")
    modulation(op, "gate", a.gate, a.x)
    shift_and_scale(op, a.shift, a.scale, a.x)
    check.number(op, "eps", a.eps, above=0)
    if a.out_dtype is not None:
        check.dtype(op, "out_dtype", a.out_dtype)


def _save(ctx, a: GatedResidualLayerNormModulate, results) -> None:
    residual, _, mean, rstd = results
    ctx.save_for_backward(residual, a.h, a.gate, a.scale, mean, rstd)
    ctx.options = a.eps, a.shift.dtype


def _backward(ctx, needed: GatedResidualLayerNormModulate, grad_residual, grad_y, *_) -> dict:
    needs = needed.h, needed.gate, needed.shift or needed.scale
    grads = _bwd(grad_residual, grad_y, *ctx.saved_tensors, *ctx.options, *needs)
    return check.wanted(needed, **dict(zip(("x", "h", "gate", "shift", "scale"), grads, strict=True)))


def _fake_fwd(a: GatedResidualLayerNormModulate):
    statistic = a.x.new_empty(a.x.shape[:-1], dtype=check.compute_dtype(a.x, a.h, a.gate, a.shift, a.scale))
    y = a.x.new_empty(a.x.shape, dtype=a.out_dtype)
    return a.x.new_empty(a.x.shape), y, statistic, torch.empty_like(statistic)


def _fake_bwd(a: GatedResidualLayerNormModulateGrad):
    served = a.scale.shape if a.need_modulation else (0,)
    return (
        a.residual.new_empty(a.residual.shape),
        a.h.new_empty(a.h.shape if a.need_h else (0,)),
        a.gate.new_empty(a.gate.shape if a.need_gate else (0,)),
        a.scale.new_empty(served, dtype=a.shift_dtype),
        a.scale.new_empty(served),
    )


def _formula_bwd(a: GatedResidualLayerNormModulateGrad):
    """The statistics are functions of residual."""
    mean, rstd = reference.layer_norm_statistics(a.residual, a.eps, a.mean.dtype)
    return reference.run("gated_residual_layer_norm_modulate_bwd", a._replace(mean=mean, rstd=rstd))


_bwd = define(
    "gated_residual_layer_norm_modulate_bwd",
    GatedResidualLayerNormModulateGrad,
    "grad_x grad_h grad_gate grad_shift grad_scale",
    _fake_bwd,
    formula=_formula_bwd,
)
_fwd = define(
    "gated_residual_layer_norm_modulate_fwd",
    GatedResidualLayerNormModulate,
    "residual y mean rstd",
    _fake_fwd,
    check=_check,
    save=_save,
    backward=_backward,
    constant_results=(2, 3),
)
