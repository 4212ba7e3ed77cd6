"""The gated residual of adaLN-Zero blocks."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.ops._modulation import modulation, tokens, wanted


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h.

    Args:
        x: [B, ..., D], at least 2-D: the residual stream. Any float dtype, as h and gate.
        h: x's shape: a branch's output.
        gate: shapes as ``shift`` of :func:`layer_norm_modulate`.

    Returns:
        x's shape and dtype, contiguous; computed in float32 (float64 where any tensor is float64).

    Differentiable in all three.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: the gated residual of adaLN-Zero, DiT (arXiv 2212.09748).
    """
    op = "gated_residual"
    check.floating(op, "x", x, min_dim=2)
    check.like(op, "h", h, x, "x")
    gate = modulation(op, "gate", gate, x)
    return _gated_residual_fwd(tokens(x), tokens(h), gate).reshape(x.shape)


def _save(ctx, inputs, output):
    _, h, gate = inputs
    ctx.save_for_backward(h, gate)


def _backward(ctx, grad):
    h, gate = ctx.saved_tensors
    need_x, need_h, need_gate = ctx.needs_input_grad
    grads = (None, None)
    if need_h or need_gate:
        grads = wanted(_gated_residual_bwd(grad, h, gate, need_h, need_gate), (need_h, need_gate))
    return grad if need_x else None, *grads


def _fake_bwd(grad, h, gate, need_h, need_gate):
    return h.new_empty(h.shape if need_h else (0,)), gate.new_empty(gate.shape if need_gate else (0,))


_gated_residual_bwd = define(
    "gated_residual_bwd(Tensor grad, Tensor h, Tensor gate, bool need_h, bool need_gate) "
    "-> (Tensor grad_h, Tensor grad_gate)",
    _fake_bwd,
)
_gated_residual_fwd = define(
    "gated_residual_fwd(Tensor x, Tensor h, Tensor gate) -> Tensor",
    lambda x, h, gate: x.new_empty(x.shape),
    setup_context=_save,
    backward=_backward,
)
