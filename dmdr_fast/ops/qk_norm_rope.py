"""RMS norm and rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dmdr_fast import reference
from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.reference.registry import Result, like


class QKNormRope(NamedTuple):
    q: Tensor
    k: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    eps: float
    interleaved: bool


class QKNormRopeGrad(NamedTuple):
    grad_q: Tensor | None
    grad_k: Tensor | None
    q: Tensor
    k: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    q_rstd: Tensor
    k_rstd: Tensor
    eps: float
    interleaved: bool
    need_weights: bool


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

    One norm over all heads together (Wan): give all heads of a token as one, q as [B, T, 1, H D] and cos and sin H
    times side by side; interleaved only. The CPU kernels' backward takes up to 1024 features so.

    Args:
        q: [B, T, Hq, D], any float dtype; views of a packed projection (last dimension contiguous) are read
            in place.
        k: [B, T, Hk, D]; Hk may differ from Hq.
        q_weight, k_weight: [D], or None for 1.
        cos, sin: [T, D] or [B, T, D], constants; both or neither (then no rotation). D is then even.
        eps: above 0.
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
    return _fwd.checked("qk_norm_rope", q, k, q_weight, k_weight, cos, sin, eps, bool(interleaved))[:2]


def _check(op: str, a: QKNormRope) -> None:
    for name, value in (("q", a.q), ("k", a.k)):
        check.floating(op, name, value)
        if value.dim() != 4:
            raise ValueError(f"{op}: {name}: expected [B, T, heads, D], got shape {list(value.shape)}")
    batch, tokens, _, width = a.q.shape
    check.shaped(op, "k", a.k, (batch, tokens, a.k.shape[2], width), "q's B, T and D", a.q, "q")
    for name, weight in (("q_weight", a.q_weight), ("k_weight", a.k_weight)):
        if weight is not None:
            check.shaped(op, name, weight, (width,), "D", a.q, "q")
    if (a.cos is None) != (a.sin is None):
        raise ValueError(f"{op}: {'cos' if a.cos is None else 'sin'}: expected with its counterpart, got None")
    if a.cos is not None and a.sin is not None:
        if width % 2:
            raise ValueError(f"{op}: q: expected an even D for the rotation, got {width}")
        _check_table(op, "cos", a.cos, a.q)
        _check_table(op, "sin", a.sin, a.q)
    check.number(op, "eps", a.eps, above=0)


def _check_table(op: str, name: str, value: Tensor, q: Tensor) -> None:
    batch, tokens, _, width = q.shape
    check.constant(op, name, value)
    if isinstance(value, Tensor) and value.dim() == 3:
        check.shaped(op, name, value, (batch, tokens, width), "B, T, D", q, "q")
    else:
        check.shaped(op, name, value, (tokens, width), "T, D", q, "q")


def _save(ctx, a: QKNormRope, results) -> None:
    ctx.save_for_backward(*a[:6], *results[2:])
    ctx.options = a.eps, a.interleaved


def _backward(ctx, needed: QKNormRope, grad_q, grad_k, *_) -> dict:
    grads = _bwd(grad_q, grad_k, *ctx.saved_tensors, *ctx.options, needed.q_weight or needed.k_weight)
    received = dict(zip(("q", "k", "q_weight", "k_weight"), grads, strict=True))
    for name in (*(("q", "q_weight") if grad_q is None else ()), *(("k", "k_weight") if grad_k is None else ())):
        received[name] = None
    return check.wanted(needed, **received)


def _formula_bwd(a: QKNormRopeGrad):
    """The statistics are functions of q and k."""
    q_rstd, k_rstd = (reference.rms_norm_statistic(x, a.eps, a.q_rstd.dtype) for x in (a.q, a.k))
    return reference.run("qk_norm_rope_bwd", a._replace(q_rstd=q_rstd, k_rstd=k_rstd))


def _results(a: QKNormRope):
    compute = check.compute_dtype(*a[:6])
    return like(a.q), like(a.k), *(Result(x.shape[:-1], compute) for x in (a.q, a.k))


def _results_bwd(a: QKNormRopeGrad):
    """What a side that got no gradient would give counts as not needed."""
    sides = (a.grad_q, a.q, a.q_weight), (a.grad_k, a.k, a.k_weight)
    weights = (
        like(x, needed=False) if weight is None else like(weight, needed=a.need_weights and grad is not None)
        for grad, x, weight in sides
    )
    return *(like(x, needed=grad is not None) for grad, x, _ in sides), *weights


_bwd = define(
    "qk_norm_rope_bwd", QKNormRopeGrad, "grad_q grad_k grad_q_weight grad_k_weight", _results_bwd, formula=_formula_bwd
)
_fwd = define(
    "qk_norm_rope_fwd", QKNormRope, "q_out k_out q_rstd k_rstd", _results,
    check=_check, save=_save, backward=_backward, constants=(2, 3),
)  # fmt: skip
