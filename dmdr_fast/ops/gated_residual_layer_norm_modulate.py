"""The gated residual and the adaptive norm that follows it, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmdr_fast import reference
from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.ops._modulation import modulation, norm_options, shift_and_scale
from dmdr_fast.reference.registry import Result, like


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

    The norm is of r as rounded to x's dtype, so the result is that of ``gated_residual`` followed by
    ``layer_norm_modulate``, read and written once.

    Args:
        x, h, gate: as in ``gated_residual``.
        shift, scale, eps, out_dtype: as in ``layer_norm_modulate``; out_dtype is that of the second
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
    norm_options(op, a.eps, a.out_dtype)


def _save(ctx, a: GatedResidualLayerNormModulate, results) -> None:
    residual, _, mean, rstd = results
    ctx.save_for_backward(residual, a.h, a.gate, a.scale, mean, rstd)
    ctx.options = a.eps, a.shift.dtype


def _backward(ctx, needed: GatedResidualLayerNormModulate, grad_residual, grad_y, *_) -> dict:
    needs = needed.h, needed.gate, needed.shift or needed.scale
    grads = _bwd(grad_residual, grad_y, *ctx.saved_tensors, *ctx.options, *needs)
    return check.wanted(needed, **dict(zip(("x", "h", "gate", "shift", "scale"), grads, strict=True)))


def _results(a: GatedResidualLayerNormModulate):
    statistic = Result(a.x.shape[:-1], check.compute_dtype(a.x, a.h, a.gate, a.shift, a.scale))
    return like(a.x), like(a.x, a.out_dtype), statistic, statistic


def _results_bwd(a: GatedResidualLayerNormModulateGrad):
    needed, zero = a.need_modulation, a.grad_y is None
    return (
        like(a.residual), like(a.h, needed=a.need_h), like(a.gate, needed=a.need_gate),
        like(a.scale, a.shift_dtype, needed=needed, zero=zero), like(a.scale, needed=needed, zero=zero),
    )  # fmt: skip


def _formula_bwd(a: GatedResidualLayerNormModulateGrad):
    """The statistics are functions of residual."""
    mean, rstd = reference.layer_norm_statistics(a.residual, a.eps, a.mean.dtype)
    return reference.run("gated_residual_layer_norm_modulate_bwd", a._replace(mean=mean, rstd=rstd))


_bwd = define(
    "gated_residual_layer_norm_modulate_bwd", GatedResidualLayerNormModulateGrad,
    "grad_x grad_h grad_gate grad_shift grad_scale", _results_bwd, formula=_formula_bwd,
)  # fmt: skip
_fwd = define(
    "gated_residual_layer_norm_modulate_fwd", GatedResidualLayerNormModulate, "residual y mean rstd", _results,
    check=_check, save=_save, backward=_backward, constants=(2, 3),
)  # fmt: skip
