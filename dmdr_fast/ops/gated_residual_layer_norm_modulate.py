"""The gated residual and the adaptive norm that follows it, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.ops._modulation import modulation, norm_options, shift_and_scale, tokens, wanted


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
    check.floating(op, "x", x, min_dim=2)
    check.like(op, "h", h, x, "x")
    gate = modulation(op, "gate", gate, x)
    shift, scale = shift_and_scale(op, shift, scale, x)
    out_dtype = norm_options(op, eps, x, out_dtype)
    residual, modulated, _, _ = _gated_residual_layer_norm_modulate_fwd(
        tokens(x), tokens(h), gate, shift, scale, float(eps), out_dtype
    )
    return residual.reshape(x.shape), modulated.reshape(x.shape)


def _save(ctx, inputs, output):
    _, h, gate, shift, scale, _, _ = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, h, gate, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype


def _backward(ctx, grad_residual, grad_y, grad_of_mean, grad_of_rstd):
    if grad_residual is None and grad_y is None:
        return (None,) * 7
    _, need_h, need_gate, need_shift, need_scale, *_ = ctx.needs_input_grad
    grads = _gated_residual_layer_norm_modulate_bwd(
        grad_residual,
        grad_y,
        *ctx.saved_tensors,
        ctx.shift_dtype,
        need_h,
        need_gate,
        need_shift or need_scale,
    )
    return *wanted(grads, ctx.needs_input_grad), None, None


def _fake_fwd(x, h, gate, shift, scale, eps, out_dtype):
    statistic = x.new_empty(x.shape[:-1], dtype=check.compute_dtype(x, h, gate, shift, scale))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), statistic, torch.empty_like(statistic)


def _fake_bwd(
    grad_residual,
    grad_y,
    residual,
    h,
    gate,
    scale,
    mean,
    rstd,
    shift_dtype,
    need_h,
    need_gate,
    need_modulation,
):
    served = scale.shape if need_modulation else (0,)
    return (
        residual.new_empty(residual.shape),
        h.new_empty(h.shape if need_h else (0,)),
        gate.new_empty(gate.shape if need_gate else (0,)),
        scale.new_empty(served, dtype=shift_dtype),
        scale.new_empty(served),
    )


_gated_residual_layer_norm_modulate_bwd = define(
    "gated_residual_layer_norm_modulate_bwd(Tensor? grad_residual, Tensor? grad_y, Tensor residual, "
    "Tensor h, Tensor gate, Tensor scale, Tensor mean, Tensor rstd, ScalarType shift_dtype, bool need_h, "
    "bool need_gate, bool need_modulation) "
    "-> (Tensor grad_x, Tensor grad_h, Tensor grad_gate, Tensor grad_shift, Tensor grad_scale)",
    _fake_bwd,
)
_gated_residual_layer_norm_modulate_fwd = define(
    "gated_residual_layer_norm_modulate_fwd(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, "
    "float eps, ScalarType out_dtype) -> (Tensor residual, Tensor y, Tensor mean, Tensor rstd)",
    _fake_fwd,
    setup_context=_save,
    backward=_backward,
)
