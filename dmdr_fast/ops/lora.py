"""LoRA with one scale per sample: roles that share a base run as one batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, by
from dmdr_fast.reference import Result, compute_dtype, like, per_sample


def multi_lora(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor | float) -> Tensor:
    """base_out + scale_b (x A) B: a low-rank update whose strength is each sample's own.

    With the batch [fake | real cond | real uncond] and the scale [s_f | s_r | s_r] one pass of the shared
    base serves the fake and the real score (DynaDG). Samples of scale 0 get base_out as it is and add nothing
    to a gradient. With x = base_out it is the post-projection form q + s q A B.

    Args:
        x: [B, ..., in], the input of the base layer, at least 2-D. Any float dtype, as all tensors here; may
            be mixed.
        base_out: [B, ..., out], the base layer's output.
        A: [in, r]. Or [2, in, r] for a packed projection: x and base_out are then three blocks [q | k | v], of in and
            of out features each. q and v get an update of their own, k passes.
        B: [r, out], or [2, r, out].
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
    dtype = compute_dtype(x, base_out, A, B)
    if not isinstance(scale, Tensor):
        check.floating(op, "x", x, min_dim=2)
        scale = x.new_full((), check.number(op, "scale", scale), dtype=dtype)
    elif scale.dtype is not dtype and scale.is_floating_point():
        scale = scale.to(dtype)
    return _fwd.checked(op, x, base_out, A, B, scale)[0]


def _check(op: str, a) -> None:
    check.floating(op, "x", a.x, min_dim=2)
    for name, value in (("A", a.A), ("B", a.B)):
        check.floating(op, name, value)
        if value.dim() not in (2, 3):
            raise ValueError(f"{op}: {name}: expected 2 dimensions, got shape {list(value.shape)}")
    x, rank, out = a.x, a.A.shape[-1], a.B.shape[-1]
    pair, blocks = ((2,), 3) if a.A.dim() == 3 else ((), 1)
    if x.shape[-1] % blocks:
        raise ValueError(f"{op}: x: expected three blocks of one size, as A is a pair, got shape {list(x.shape)}")
    check.shaped(op, "A", a.A, (*pair, x.shape[-1] // blocks, rank), "in = x's last dimension, r", x, "x")
    check.shaped(op, "B", a.B, (*pair, rank, out), "r = A's last dimension, out", x, "x")
    check.shaped(op, "base_out", a.base_out, (*x.shape[:-1], blocks * out), "x's leading dimensions, out", x, "x")
    check.constant(op, "scale", a.scale)
    check.per_sample(op, "scale", a.scale, x, "x", one_for_all=True)


def _results(a):
    dtype = compute_dtype(a.x, a.base_out, a.A, a.B)
    return like(a.base_out), Result((*a.A.shape[:-2], *a.x.shape[:-1], a.A.shape[-1]), dtype)


def _results_bwd(a):
    return like(a.x, needed=a.need_x), like(a.A, needed=a.need_A), like(a.B, needed=a.need_B)


def _formula(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(x, base_out, A, B)
    projected = _low_rank(x, A, scale, compute)
    return base_out.to(compute) + _whole(_product(projected, B.to(compute)), B), projected


def _formula_bwd(
    grad: Tensor, x: Tensor, low_rank: Tensor, A: Tensor, B: Tensor, scale: Tensor,
    need_x: bool, need_A: bool, need_B: bool,
):  # fmt: skip
    compute, first = low_rank.dtype, A.dim() - 2
    grad = _ends(grad.to(compute), A)
    if need_x or need_A:
        low_rank_grad = _scaled(_product(grad, B.to(compute).mT), scale, x)
    return (
        _whole(_product(low_rank_grad, A.to(compute).mT), A) if need_x else None,
        _ends(x.to(compute), A).flatten(first, -2).mT @ low_rank_grad.flatten(first, -2) if need_A else None,
        low_rank.flatten(first, -2).mT @ grad.flatten(first, -2) if need_B else None,
    )


def _ends(packed: Tensor, matrix: Tensor) -> Tensor:
    """q and v of [q | k | v], as [2, B, ..., D], where the matrices are a pair."""
    return torch.stack(packed.chunk(3, -1)[::2]) if matrix.dim() == 3 else packed


def _whole(ends: Tensor, matrix: Tensor) -> Tensor:
    """[q | 0 | v] of q and v."""
    return torch.cat((ends[0], torch.zeros_like(ends[0]), ends[1]), -1) if matrix.dim() == 3 else ends


def _product(left: Tensor, matrix: Tensor) -> Tensor:
    """left matrix, each of a pair with its own."""
    return left @ (matrix.reshape(2, *[1] * (left.dim() - 3), *matrix.shape[1:]) if matrix.dim() == 3 else matrix)


def _low_rank(x: Tensor, A: Tensor, scale: Tensor, compute: torch.dtype) -> Tensor:
    """scale_b (x A) [B, ..., r] in the compute dtype."""
    return _scaled(_product(_ends(x.to(compute), A), A.to(compute)), scale, x)


def _scaled(low_rank: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """scale_b low_rank, exactly 0 where the scale is, also for a row that is not finite."""
    scale = per_sample(scale, x) if scale.dim() else scale
    return torch.where(scale != 0, scale * low_rank, 0)


# torch's FlopCounterMode does not look inside an operator. Multiply-adds count 2, as for its own matmuls.
def _flops_fwd(x_shape, base_shape, a_shape, b_shape, scale_shape, **_) -> int:
    return 2 * math.prod(x_shape[:-1]) * (math.prod(a_shape) + math.prod(b_shape))


def _flops_bwd(grad_shape, x_shape, low_rank_shape, a_shape, b_shape, scale_shape, need_x, need_A, need_B, **_) -> int:
    # grad B^T once for x and A; then its products with A and with x; low_rank^T grad for B.
    with_a, with_b = need_x + need_A, (need_x or need_A) + need_B
    return 2 * math.prod(x_shape[:-1]) * (with_a * math.prod(a_shape) + with_b * math.prod(b_shape))


_bwd = Raw(
    "multi_lora_bwd", "grad_x grad_A grad_B", _results_bwd, _formula_bwd, flops=_flops_bwd,
    recompute=lambda a: {"low_rank": _low_rank(a.x, a.A, a.scale, a.low_rank.dtype)},
)  # fmt: skip
# low_rank is kept: it is r / in of x's size, and to make it again would read all of x.
_fwd = Raw(
    "multi_lora_fwd", "out low_rank", _results, _formula,
    check=_check, check_values=lambda op, a: check.values(op, "scale", a.scale),
    backward=by(_bwd, through="base_out"), constants=(1,), flops=_flops_fwd,
)  # fmt: skip
