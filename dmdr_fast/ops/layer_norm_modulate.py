"""Adaptive layer norm: normalise, scale, shift."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.ops._modulation import norm_options, shift_and_scale, tokens, wanted


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) (1 + scale) + shift, with LN(x) = (x - mean) / sqrt(var + eps) over the last dimension.

    Args:
        x: [B, ..., D], at least 2-D, any float dtype.
        shift, scale: [D], [B, D], [B, 1, D] or x's shape (for x of more than 3 dimensions: middle dimensions
            all 1 or all x's); the same shape for both. Any float dtype.
        eps: > 0, added to the (biased) variance.
        out_dtype: dtype of the result; None means x's.

    Returns:
        x's shape, contiguous. Statistics and arithmetic in float32 (float64 where any tensor is float64).

    Differentiable in x, shift and scale; sums over tokens and samples are in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: adaLN of DiT (arXiv 2212.09748), ``modulate(norm(x), shift, scale)``; diffusers' AdaLayerNormZero.
    """
    op = "layer_norm_modulate"
    check.floating(op, "x", x, min_dim=2)
    shift, scale = shift_and_scale(op, shift, scale, x)
    out_dtype = norm_options(op, eps, x, out_dtype)
    return _layer_norm_modulate_fwd(tokens(x), shift, scale, float(eps), out_dtype)[0].reshape(x.shape)


def _save(ctx, inputs, output):
    x, shift, scale, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype


def _backward(ctx, grad, grad_of_mean, grad_of_rstd):
    if grad is None:
        return (None,) * 5
    x, scale, mean, rstd = ctx.saved_tensors
    need_x, need_shift, need_scale, *_ = ctx.needs_input_grad
    grads = _layer_norm_modulate_bwd(grad, x, scale, mean, rstd, ctx.shift_dtype, need_x, need_shift or need_scale)
    return *wanted(grads, ctx.needs_input_grad), None, None


def _fake_fwd(x, shift, scale, eps, out_dtype):
    statistic = x.new_empty(x.shape[:-1], dtype=check.compute_dtype(x, shift, scale))
    return x.new_empty(x.shape, dtype=out_dtype), statistic, torch.empty_like(statistic)


def _fake_bwd(grad, x, scale, mean, rstd, shift_dtype, need_x, need_modulation):
    modulation = scale.shape if need_modulation else (0,)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        scale.new_empty(modulation, dtype=shift_dtype),
        scale.new_empty(modulation),
    )


_layer_norm_modulate_bwd = define(
    "layer_norm_modulate_bwd(Tensor grad, Tensor x, Tensor scale, Tensor mean, Tensor rstd, "
    "ScalarType shift_dtype, bool need_x, bool need_modulation) "
    "-> (Tensor grad_x, Tensor grad_shift, Tensor grad_scale)",
    _fake_bwd,
)
_layer_norm_modulate_fwd = define(
    "layer_norm_modulate_fwd(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    _fake_fwd,
    setup_context=_save,
    backward=_backward,
)
