"""LoRA with one scale per sample: roles that share a base run as one batch."""

from __future__ import annotations

import math

from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define


def multi_lora(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor | float) -> Tensor:
    """base_out + scale_b (x A) B: a low-rank update whose strength is each sample's own.

    With the batch [fake | real cond | real uncond] and the scale [s_f | s_r | s_r] one pass of the shared
    base serves the fake and the real score (DynaDG). Samples of scale 0 get base_out as it is and add nothing
    to a gradient. With x = base_out it is the post-projection form q + s q A B.

    Args:
        x: [B, ..., in], the input of the base layer, at least 2-D. Any float dtype, as all tensors here; may
            be mixed.
        base_out: [B, ..., out], the base layer's output.
        A: [in, r].
        B: [r, out].
        scale: [B] (or one number for all), finite; a constant.

    Returns:
        [B, ..., out], contiguous, in base_out's dtype; computed in float32 (float64 where any tensor is
        float64). Where all are bfloat16 a backend may round scale_b (x A) to bfloat16 once, as two matmuls would.

    Differentiable in x, base_out, A and B. Sums over rows are in a fixed order. Under autocast nothing is
    cast: the dtypes are those of the tensors.

    Raises:
        TypeError, ValueError: an argument is not as described; scale requires grad.

    Source: LoRA (arXiv 2106.09685); the per-role scales of DMDR (arXiv 2511.13649), section on dynamic
    distribution guidance.
    """
    op = "multi_lora"
    check.floating(op, "x", x, min_dim=2)
    for name, value in (("A", A), ("B", B)):
        check.floating(op, name, value)
        if value.dim() != 2:
            raise ValueError(f"{op}: {name}: expected 2 dimensions, got shape {list(value.shape)}")
    check.shaped(op, "A", A, (x.shape[-1], A.shape[1]), "in = x's last dimension, r", x, "x")
    check.shaped(op, "B", B, (A.shape[1], B.shape[1]), "r = A's last dimension, out", x, "x")
    check.shaped(op, "base_out", base_out, (*x.shape[:-1], B.shape[1]), "x's leading dimensions, out", x, "x")
    check.constant(op, "scale", scale)
    scale = check.per_sample(op, "scale", scale, x, "x", check.compute_dtype(x, base_out, A, B))
    return _multi_lora_fwd(x, base_out, A, B, scale)[0]


def _save(ctx, inputs, output):
    x, _, A, B, scale = inputs
    _, low_rank = output
    ctx.mark_non_differentiable(low_rank)
    ctx.set_materialize_grads(False)
    # low_rank is r / in of x's size; to make it again would read all of x.
    ctx.save_for_backward(x, low_rank, A, B, scale)


def _backward(ctx, grad, grad_of_low_rank):
    if grad is None:
        return (None,) * 5
    x, low_rank, A, B, scale = ctx.saved_tensors
    need_x, need_base, need_a, need_b, _ = ctx.needs_input_grad
    grad_x = grad_a = grad_b = None
    if need_x or need_a or need_b:
        grad_x, grad_a, grad_b = _multi_lora_bwd(grad, x, low_rank, A, B, scale, need_x, need_a, need_b)
    return (
        grad_x if need_x else None,
        grad if need_base else None,
        grad_a if need_a else None,
        grad_b if need_b else None,
        None,
    )


def _fake_fwd(x, base_out, A, B, scale):
    low_rank = x.new_empty((*x.shape[:-1], A.shape[1]), dtype=check.compute_dtype(x, base_out, A, B))
    return base_out.new_empty(base_out.shape), low_rank


def _fake_bwd(grad, x, low_rank, A, B, scale, need_x, need_a, need_b):
    return tuple(
        value.new_empty(value.shape if need else (0,)) for value, need in ((x, need_x), (A, need_a), (B, need_b))
    )


# torch's FlopCounterMode does not look inside an operator. Multiply-adds count 2, as for its own matmuls.
def _flops_fwd(x_shape, base_shape, a_shape, b_shape, scale_shape, **options) -> int:
    return 2 * math.prod(x_shape[:-1]) * (math.prod(a_shape) + math.prod(b_shape))


def _flops_bwd(
    grad_shape, x_shape, low_rank_shape, a_shape, b_shape, scale_shape, need_x, need_a, need_b, **options
) -> int:
    # grad B^T once for x and A; then its products with A and with x; low_rank^T grad for B.
    with_a, with_b = need_x + need_a, (need_x or need_a) + need_b
    return 2 * math.prod(x_shape[:-1]) * (with_a * math.prod(a_shape) + with_b * math.prod(b_shape))


_multi_lora_bwd = define(
    "multi_lora_bwd(Tensor grad, Tensor x, Tensor low_rank, Tensor A, Tensor B, Tensor scale, bool need_x, "
    "bool need_a, bool need_b) -> (Tensor grad_x, Tensor grad_a, Tensor grad_b)",
    _fake_bwd,
    flops=_flops_bwd,
)
_multi_lora_fwd = define(
    "multi_lora_fwd(Tensor x, Tensor base_out, Tensor A, Tensor B, Tensor scale) -> (Tensor out, Tensor low_rank)",
    _fake_fwd,
    setup_context=_save,
    backward=_backward,
    flops=_flops_fwd,
)
