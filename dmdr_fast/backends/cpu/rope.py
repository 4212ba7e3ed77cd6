"""RMS norm and rotary embedding of queries and keys on the CPU kernels."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.backends.cpu.library import kernel, new_float, new_output, pointer, workspace
from dmdr_fast.backends.views import ABSENT, DTYPE_CODE, row_view

_space = workspace("qk_norm_rope", 3)
_fwd = kernel("qk_norm_rope_fwd", "dmdr_qk_norm_rope_args")
_bwd = kernel("qk_norm_rope_bwd", "dmdr_qk_norm_rope_args")

MOST_FEATURES = 1024  # DMDR_ROPE_FEATURES


def qk_norm_rope_fwd(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.qk_norm_rope_fwd`."""
    sides, results, held = [], [], []
    for x, weight in ((q, q_weight), (k, k_weight)):
        out = new_output(x.shape, x.dtype)
        rstd = new_float(x.shape[:3])
        views = [_head_view(x), _vector_view(weight), _head_view(out)]
        sides += [x.shape[2], *[field for fields, _ in views for field in fields], *ABSENT, *ABSENT]
        sides += [rstd.data_ptr(), 0]
        results.append((out, rstd))
        held.append(views)
    (cos, _cos), (sin, _sin) = row_view(cos), row_view(sin)
    _fwd(q.shape[0], q.shape[1], q.shape[3], *sides, *cos, *sin, eps, interleaved, 0)
    (q_out, q_rstd), (k_out, k_rstd) = results
    return q_out, k_out, q_rstd, k_rstd


def qk_norm_rope_bwd(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    interleaved: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.qk_norm_rope_bwd`."""
    sides, results, held = [], [], []
    for grad, x, weight, rstd in ((grad_q, q, q_weight, q_rstd), (grad_k, k, k_weight, k_rstd)):
        rstd = rstd.contiguous()
        grad_x = x.new_empty(0) if grad is None else new_output(x.shape, x.dtype)
        sums_weight = need_weights and grad is not None and weight is not None
        grad_weight = new_float(x.shape[3] if sums_weight else 0)
        views = [_head_view(x), _vector_view(weight), (ABSENT, None), _head_view(grad)]
        views.append((ABSENT, None) if grad is None else _head_view(grad_x))
        sides += [x.shape[2], *[field for fields, _ in views for field in fields]]
        sides += [rstd.data_ptr(), pointer(grad_weight) if sums_weight else 0]
        results.append((grad_x, grad_weight, x.dtype if weight is None else weight.dtype))
        held.append((views, rstd))
    space = _space(q.shape[0], q.shape[1], q.shape[3])
    (cos, _cos), (sin, _sin) = row_view(cos), row_view(sin)
    _bwd(q.shape[0], q.shape[1], q.shape[3], *sides, *cos, *sin, 0.0, interleaved, space.data_ptr())
    (dq, dq_weight, q_dtype), (dk, dk_weight, k_dtype) = results
    return dq, dk, dq_weight.to(q_dtype), dk_weight.to(k_dtype)


def _head_view(tensor: Tensor | None) -> tuple[tuple[int, ...], Tensor | None]:
    """The ABI's fields of [B, T, heads, D], and the tensor they point into."""
    if tensor is None:
        return ABSENT, None
    if tensor.stride(3) != 1 and tensor.shape[3] != 1:
        tensor = tensor.contiguous()
    return (tensor.data_ptr(), DTYPE_CODE[tensor.dtype], *tensor.stride()[:3], 0, 0), tensor


def _vector_view(vector: Tensor | None) -> tuple[tuple[int, ...], Tensor | None]:
    """The ABI's fields of [D], and the tensor they point into."""
    if vector is None:
        return ABSENT, None
    vector = vector.contiguous()
    return (vector.data_ptr(), DTYPE_CODE[vector.dtype], 0, 0, 0, 0, 0), vector
