"""The gated residual of adaLN-Zero blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import by, define
from dmdr_fast.ops._modulation import broadcast, gate_gradients, modulation
from dmdr_fast.reference import compute_dtype, like


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


def _results_bwd(a: GatedResidualGrad):
    return like(a.h, needed=a.need_h), like(a.gate, needed=a.need_gate)


def _formula(a: GatedResidual) -> Tensor:
    compute = compute_dtype(a.x, a.h, a.gate)
    return a.x.to(compute) + broadcast(a.gate, a.x).to(compute) * a.h.to(compute)


def _formula_bwd(a: GatedResidualGrad) -> tuple[Tensor | None, Tensor | None]:
    return gate_gradients(a.grad_residual.to(compute_dtype(a.grad_residual, a.h, a.gate)), a)


_bwd = define("gated_residual_bwd", GatedResidualGrad, "grad_h grad_gate", _results_bwd, _formula_bwd)
_fwd = define(
    "gated_residual_fwd", GatedResidual, "residual", lambda a: like(a.x), _formula,
    check=_check, backward=by(_bwd, through="x"),
)  # fmt: skip
