"""RMS norm and rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, by
from dmdr_fast.ops._modulation import rms_norm_statistic, weighted
from dmdr_fast.reference import Result, compute_dtype, like


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
    times side by side; interleaved only. docs/drop-in.md has the call.

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


def _check(op: str, a) -> None:
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
    if a.cos is not None and width % 2:
        raise ValueError(f"{op}: q: expected an even D for the rotation, got {width}")
    for name, table in (("cos", a.cos), ("sin", a.sin)):
        check.constant(op, name, table)
        if isinstance(table, Tensor) and table.dim() == 3:
            check.shaped(op, name, table, (batch, tokens, width), "B, T, D", a.q, "q")
        elif table is not None:
            check.shaped(op, name, table, (tokens, width), "T, D", a.q, "q")
    check.number(op, "eps", a.eps, above=0)


def _results(a):
    compute = compute_dtype(*a[:6])
    return like(a.q), like(a.k), *(Result(x.shape[:-1], compute) for x in (a.q, a.k))


def _results_bwd(a):
    """What a side that got no gradient would give counts as not needed."""
    sides = (a.grad_q_out, a.q, a.q_weight), (a.grad_k_out, a.k, a.k_weight)

    def of_weight(grad: Tensor | None, x: Tensor, weight: Tensor | None) -> Result:
        needed = a.need_q_weight_or_k_weight and grad is not None and weight is not None
        return like(x if weight is None else weight, needed=needed)

    return *(like(x, needed=grad is not None) for grad, x, _ in sides), *(of_weight(*side) for side in sides)


def _formula(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    compute = compute_dtype(q, k, q_weight, k_weight, cos, sin)

    def side(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        rstd = rms_norm_statistic(x, eps, compute)
        y = weighted(x.to(compute) * rstd.unsqueeze(-1), weight)
        if cos is not None and sin is not None:
            y = y * _per_head(cos, compute) + _rotate(y, interleaved) * _per_head(sin, compute)
        return y.to(x.dtype), rstd

    (q_out, q_rstd), (k_out, k_rstd) = side(q, q_weight), side(k, k_weight)
    return q_out, k_out, q_rstd, k_rstd


def _formula_bwd(
    grad_q_out: Tensor | None, grad_k_out: Tensor | None, q: Tensor, k: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    q_rstd: Tensor, k_rstd: Tensor, eps: float, interleaved: bool, need_q_weight_or_k_weight: bool,
):  # fmt: skip
    def side(grad: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor):
        if grad is None:
            return None, None
        compute, rstd = rstd.dtype, rstd.unsqueeze(-1)
        grad, normal = grad.to(compute), x.to(compute) * rstd
        if cos is not None and sin is not None:
            # The rotation's matrix is skew: its transpose is its negative.
            grad = grad * _per_head(cos, compute) - _rotate(grad * _per_head(sin, compute), interleaved)
        inner = weighted(grad, weight)
        grad_x = rstd * (inner - normal * (inner * normal).mean(-1, keepdim=True))
        needed = need_q_weight_or_k_weight and weight is not None
        return grad_x, (grad * normal).sum((0, 1, 2)) if needed else None

    grad_q, grad_q_weight = side(grad_q_out, q, q_weight, q_rstd)
    grad_k, grad_k_weight = side(grad_k_out, k, k_weight, k_rstd)
    return grad_q, grad_k, grad_q_weight, grad_k_weight


def _per_head(table: Tensor, compute: torch.dtype) -> Tensor:
    """cos or sin, the same for all heads of a token."""
    return table.to(compute).unsqueeze(-2)


def _rotate(y: Tensor, interleaved: bool) -> Tensor:
    """(y0, y1) -> (-y1, y0) over neighbouring pairs, or over the two halves."""
    if interleaved:
        return torch.stack((-y[..., 1::2], y[..., 0::2]), -1).flatten(-2)
    first, second = y.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _statistics(a) -> dict[str, Tensor]:
    return {f"{side}_rstd": rms_norm_statistic(x, a.eps, a.q_rstd.dtype) for side, x in (("q", a.q), ("k", a.k))}


_bwd = Raw(
    "qk_norm_rope_bwd", "grad_q grad_k grad_q_weight grad_k_weight", _results_bwd, _formula_bwd,
    recompute=_statistics,
)  # fmt: skip
_fwd = Raw(
    "qk_norm_rope_fwd", "q_out k_out q_rstd k_rstd", _results, _formula,
    check=_check, backward=by(_bwd), constants=(2, 3),
)  # fmt: skip
