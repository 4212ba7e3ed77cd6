"""The gated residual and the adaptive norm that follows it, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops import _modulation as parts
from dmdr_fast.ops._library import Raw, by
from dmdr_fast.ops.gated_residual import formula as gated_residual_formula
from dmdr_fast.ops.layer_norm_modulate import formula as layer_norm_modulate_formula
from dmdr_fast.reference import Result, compute_dtype, like


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


def _check(op: str, a) -> None:
    parts.gated(op, a.x, a.h, a.gate)
    parts.shift_and_scale(op, a.shift, a.scale, a.x)
    check.number(op, "eps", a.eps, above=0)


def _results(a):
    statistic = Result(a.x.shape[:-1], compute_dtype(a.x, a.h, a.gate, a.shift, a.scale))
    return like(a.x), like(a.x, a.out_dtype), statistic, statistic


def _results_bwd(a):
    needed, zero = a.need_shift_or_scale, a.grad_y is None
    return (
        like(a.residual), like(a.h, needed=a.need_h), like(a.gate, needed=a.need_gate),
        like(a.scale, a.shift_dtype, needed=needed, zero=zero), like(a.scale, needed=needed, zero=zero),
    )  # fmt: skip


def _formula(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """The norm is of the rounded residual, as in two separate ops: the backward sees the same numbers."""
    residual = gated_residual_formula(x, h, gate).to(x.dtype)
    return residual, *layer_norm_modulate_formula(residual, shift, scale, eps, out_dtype)


def _formula_bwd(
    grad_residual: Tensor | None, grad_y: Tensor | None, residual: Tensor, h: Tensor, gate: Tensor, scale: Tensor,
    mean: Tensor, rstd: Tensor, eps: float, shift_dtype: torch.dtype, need_h: bool, need_gate: bool,
    need_shift_or_scale: bool,
):  # fmt: skip
    compute = compute_dtype(residual, h, gate, scale)
    if grad_y is None:
        assert grad_residual is not None  # one of the two there is
        total = grad_residual.to(compute, copy=True)
        return total, *parts.gate_gradients(total, h, gate, need_h, need_gate), None, None
    total, *vectors = parts.layer_norm_gradients(grad_y, residual, scale, mean, rstd)
    if grad_residual is not None:
        total = total + grad_residual.to(compute)
    sums = (parts.summed(grad, scale, need_shift_or_scale) for grad in vectors)
    return total, *parts.gate_gradients(total, h, gate, need_h, need_gate), *sums


_bwd = Raw(
    "gated_residual_layer_norm_modulate_bwd", "grad_x grad_h grad_gate grad_shift grad_scale", _results_bwd,
    _formula_bwd, recompute=lambda a: parts.layer_norm_statistics(a.residual, a.eps, a.mean.dtype),
)  # fmt: skip
_fwd = Raw(
    "gated_residual_layer_norm_modulate_fwd", "residual y mean rstd", _results, _formula, check=_check,
    backward=by(_bwd), constants=(2, 3),
)  # fmt: skip
