"""RMS norm and rotary embedding of queries and keys on the kernels of csrc/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmdr_fast.backends.native.library import Calls, Library, implements
from dmdr_fast.backends.views import Strided

_MOST_FEATURES = 1024  # DMDR_ROPE_FEATURES


def _refuses_bwd(library: Library, a) -> str | None:
    width = a.q.shape[3]
    return (
        f"its backward takes heads of at most {_MOST_FEATURES} features, got {width}"
        if width > _MOST_FEATURES
        else None
    )


@implements("qk_norm_rope_fwd")
def qk_norm_rope_fwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fields, outs, rstds = {}, [], []
    for side, x, weight in (("q", a.q, a.q_weight), ("k", a.k, a.k_weight)):
        outs.append(run.new(x.shape, x.dtype))
        rstds.append(run.new(x.shape[:3], torch.float32))
        fields |= _side(side, x, weight, rstds[-1], out=_heads(outs[-1]))
    run.call("qk_norm_rope_fwd", "dmdr_qk_norm_rope_args", **_common(a), **fields, eps=a.eps)
    return *outs, *rstds


@implements("qk_norm_rope_bwd", refuses=_refuses_bwd)
def qk_norm_rope_bwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fields, grads, weights = {}, [], []
    both = ("q", a.grad_q, a.q, a.q_weight, a.q_rstd), ("k", a.grad_k, a.k, a.k_weight, a.k_rstd)
    for side, grad, x, weight, rstd in both:
        summed = a.need_weights and grad is not None and weight is not None
        grads.append(run.new((0,) if grad is None else x.shape, x.dtype))
        grad_weight = run.new((x.shape[3] if summed else 0,), torch.float32)
        weights.append((grad_weight, x.dtype if weight is None else weight.dtype))
        received = {} if grad is None else {"grad": _heads(grad), "grad_x": _heads(grads[-1])}
        fields |= _side(side, x, weight, rstd.contiguous(), **received, grad_weight=grad_weight if summed else None)
    space = run.workspace("qk_norm_rope", *a.q.shape[:2], a.q.shape[3])
    run.call("qk_norm_rope_bwd", "dmdr_qk_norm_rope_args", **_common(a), **fields, workspace=space)
    return *grads, *(grad_weight.to(dtype) for grad_weight, dtype in weights)


def _common(a) -> dict[str, Any]:
    batch, rows, _, features = a.q.shape
    tables = {"cos": _table(a.cos), "sin": _table(a.sin)}
    return {"batch": batch, "rows": rows, "features": features, "interleaved": a.interleaved, **tables}


def _side(side: str, x: Tensor, weight: Tensor | None, rstd: Tensor, **others: Any) -> dict[str, Any]:
    """The fields of queries or of keys."""
    weight = None if weight is None else Strided(weight.contiguous(), ())
    fields = {"heads": x.shape[2], "x": _heads(x), "weight": weight, "rstd": rstd, **others}
    return {f"{side}_{name}": value for name, value in fields.items()}


def _heads(tensor: Tensor) -> Strided:
    """[B, T, heads, D]; copied only if the last dimension is not contiguous."""
    if tensor.stride(3) != 1 and tensor.shape[3] != 1:
        tensor = tensor.contiguous()
    return Strided(tensor, tensor.stride()[:3])


def _table(table: Tensor | None) -> Strided | None:
    """cos or sin [T, D] or [B, T, D]."""
    if table is None:
        return None
    if table.stride(-1) != 1:
        table = table.contiguous()
    return Strided(table, (0 if table.dim() == 2 or table.shape[0] == 1 else table.stride(0), table.stride(-2)))
