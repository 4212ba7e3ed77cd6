"""The gated residual of adaLN-Zero blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.ops._modulation import modulation
from dmdr_fast.reference.registry import like


class GatedResidual(NamedTuple):
    x: Tensor
    h: Tensor
    gate: Tensor


class GatedResidualGrad(NamedTuple):
    grad_residual: Tensor
    h: Tensor
    gate: Tensor
    need_h: bool
    need_gate: bool


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h.

    Args:
        x: [B, ..., D], at least 2-D: the residual stream. Any float dtype, as h and gate.
        h: x's shape: a branch's output.
        gate: shapes as ``shift`` of ``layer_norm_modulate``.

    Returns:
        x's shape and dtype, contiguous; computed in float32 (float64 where any tensor is float64).

    Differentiable in all three.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: the gated residual of adaLN-Zero, DiT (arXiv 2212.09748).
    """
    return _fwd.checked("gated_residual", x, h, gate)


def _check(op: str, a: GatedResidual) -> None:
    check.floating(op, "x", a.x, min_dim=2)
    check.like(op, "h", a.h, a.x, "x")
    modulation(op, "gate", a.gate, a.x)


def _save(ctx, a: GatedResidual, result) -> None:
    ctx.save_for_backward(a.h, a.gate)


def _backward(ctx, needed: GatedResidual, grad) -> dict:
    grad_h = grad_gate = None
    if needed.h or needed.gate:
        grad_h, grad_gate = _bwd(grad, *ctx.saved_tensors, needed.h, needed.gate)
    return check.wanted(needed, x=grad, h=grad_h, gate=grad_gate)


def _results_bwd(a: GatedResidualGrad):
    return like(a.h, needed=a.need_h), like(a.gate, needed=a.need_gate)


_bwd = define("gated_residual_bwd", GatedResidualGrad, "grad_h grad_gate", _results_bwd)
_fwd = define(
    "gated_residual_fwd", GatedResidual, "residual", lambda a: like(a.x), check=_check, save=_save, backward=_backward
)
