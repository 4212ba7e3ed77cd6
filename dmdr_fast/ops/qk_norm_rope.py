"""RMS norm and rotary position embedding of queries and keys."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """y cos + rot(y) sin with y = x / sqrt(mean x^2 + eps) * weight over the last dimension, for q and for k.

    rot is (y0, y1) -> (-y1, y0) over neighbouring pairs (interleaved) or over the two halves of D. cos and
    sin are read per lane as they are: pairs repeated (c0 c0 c1 c1 ...) when interleaved, halves repeated
    otherwise.

    Args:
        q: [B, T, Hq, D], any float dtype; views of a packed projection (last dimension contiguous) are read
            in place.
        k: [B, T, Hk, D]; Hk may differ from Hq.
        q_weight, k_weight: [D], or None for 1.
        cos, sin: [T, D] or [B, T, D], constants; both or neither (then no rotation). D is then even.
        eps: > 0.
        interleaved: see above.

    Returns:
        (q, k) normalised and rotated, their shapes and dtypes, contiguous. One rounding at the end; the
        arithmetic is in float32 (float64 where any tensor is float64).

    Differentiable in q, k and the weights; the weights' sums are in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as described; cos or sin requires grad.

    Source: RoFormer (arXiv 2104.09864) and QK normalisation (arXiv 2302.05442) as in SD3.5, FLUX, Qwen-Image,
    Z-Image.
    """
    op = "qk_norm_rope"
    for name, value in (("q", q), ("k", k)):
        check.floating(op, name, value)
        if value.dim() != 4:
            raise ValueError(f"{op}: {name}: expected [B, T, heads, D], got shape {list(value.shape)}")
    batch, tokens, _, width = q.shape
    check.shaped(op, "k", k, (batch, tokens, k.shape[2], width), "q's B, T and D", q, "q")
    for name, value in (("q_weight", q_weight), ("k_weight", k_weight)):
        if value is not None:
            check.shaped(op, name, value, (width,), "D", q, "q")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: {'cos' if cos is None else 'sin'}: expected with its counterpart, got None")
    if cos is not None:
        if width % 2:
            raise ValueError(f"{op}: q: expected an even D for the rotation, got {width}")
        cos, sin = _table(op, "cos", cos, q), _table(op, "sin", sin, q)
    check.number(op, "eps", eps, above=0)
    return _qk_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, float(eps), bool(interleaved))[:2]


def _table(op: str, name: str, value: Tensor, q: Tensor) -> Tensor:
    """cos or sin as [1 or B, T, D]."""
    batch, tokens, _, width = q.shape
    check.constant(op, name, value)
    if isinstance(value, Tensor) and value.dim() == 3:
        check.shaped(op, name, value, (batch, tokens, width), "B, T, D", q, "q")
        return value
    check.shaped(op, name, value, (tokens, width), "T, D", q, "q")
    return value.unsqueeze(0)


def _save(ctx, inputs, output):
    q, k, q_weight, k_weight, cos, sin, _, interleaved = inputs
    _, _, q_rstd, k_rstd = output
    ctx.mark_non_differentiable(q_rstd, k_rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd)
    ctx.interleaved = interleaved


def _backward(ctx, grad_q, grad_k, grad_of_q_rstd, grad_of_k_rstd):
    if grad_q is None and grad_k is None:
        return (None,) * 8
    needed = ctx.needs_input_grad[:4]
    received = (grad_q, grad_k, grad_q, grad_k)
    grads = _qk_norm_rope_bwd(grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved, needed[2] or needed[3])
    wanted = (
        grad if need and incoming is not None else None
        for grad, need, incoming in zip(grads, needed, received, strict=True)
    )
    return *wanted, None, None, None, None


def _fake_fwd(q, k, q_weight, k_weight, cos, sin, eps, interleaved):
    compute = check.compute_dtype(q, k, q_weight, k_weight, cos, sin)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        q.new_empty(q.shape[:-1], dtype=compute),
        k.new_empty(k.shape[:-1], dtype=compute),
    )


def _fake_bwd(grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd, interleaved, need_weights):
    dx, dw = [], []
    for grad, x, weight in ((grad_q, q, q_weight), (grad_k, k, k_weight)):
        dx.append(x.new_empty((0,) if grad is None else x.shape))
        like = x if weight is None else weight
        dw.append(like.new_empty(weight.shape if need_weights and not (weight is None or grad is None) else (0,)))
    return *dx, *dw


_qk_norm_rope_bwd = define(
    "qk_norm_rope_bwd(Tensor? grad_q, Tensor? grad_k, Tensor q, Tensor k, Tensor? q_weight, "
    "Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor q_rstd, Tensor k_rstd, bool interleaved, "
    "bool need_weights) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)",
    _fake_bwd,
)
_qk_norm_rope_fwd = define(
    "qk_norm_rope_fwd(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "float eps, bool interleaved) -> (Tensor q_out, Tensor k_out, Tensor q_rstd, Tensor k_rstd)",
    _fake_fwd,
    setup_context=_save,
    backward=_backward,
)
