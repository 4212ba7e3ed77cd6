"""The gated residual of adaLN-Zero blocks."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.ops._library import Raw, by
from dmdr_fast.ops._modulation import broadcast, gate_gradients, gated
from dmdr_fast.reference import compute_dtype, like


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


def formula(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    compute = compute_dtype(x, h, gate)
    return x.to(compute) + broadcast(gate, x).to(compute) * h.to(compute)


def _formula_bwd(grad_residual: Tensor, h: Tensor, gate: Tensor, need_h: bool, need_gate: bool):
    compute = compute_dtype(grad_residual, h, gate)
    return gate_gradients(grad_residual.to(compute), h, gate, need_h, need_gate)


_bwd = Raw(
    "gated_residual_bwd", "grad_h grad_gate",
    lambda a: (like(a.h, needed=a.need_h), like(a.gate, needed=a.need_gate)), _formula_bwd,
)  # fmt: skip
_fwd = Raw(
    "gated_residual_fwd",
    "residual",
    lambda a: like(a.x),
    formula,
    check=lambda op, a: gated(op, a.x, a.h, a.gate),
    backward=by(_bwd, through="x"),
)
