"""shift, scale and gate of adaptive norms: their shapes, and tokens as one dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check


def tokens(x: Tensor) -> Tensor:
    """[B, ..., D] as [B, T, D]."""
    if x.dim() == 3:
        return x
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def modulation(op: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    """shift, scale or gate as [1 or B, 1 or T, D]."""
    check.floating(op, name, value)
    check.on_device(op, name, value, x, "x")
    batch, width = x.shape[0], x.shape[-1]
    shape = tuple(value.shape)
    if shape == (width,):
        return value.reshape(1, 1, width)
    if shape == (batch, width):
        return value.unsqueeze(1)
    if shape == tuple(x.shape):
        return tokens(value)
    one_per_sample = (batch, *[1] * (x.dim() - 2), width)
    if shape == one_per_sample:
        return value.reshape(batch, 1, width)
    raise ValueError(
        f"{op}: {name}: expected shape [{width}], [{batch}, {width}], {list(one_per_sample)} or "
        f"x's {list(x.shape)}, got {list(value.shape)}"
    )


def shift_and_scale(op: str, shift: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [1 or B, 1 or T, D], of one shape."""
    shift, scale = modulation(op, "shift", shift, x), modulation(op, "scale", scale, x)
    if shift.shape != scale.shape:
        raise ValueError(f"{op}: scale: expected one per {_what(shift, x)} like shift, got one per {_what(scale, x)}")
    return shift, scale


def _what(value: Tensor, x: Tensor) -> str:
    if value.shape[1] != 1:
        return "token"
    return "sample" if value.shape[0] == x.shape[0] else "batch"


def norm_options(op: str, eps: float, x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """The result's dtype, with eps checked."""
    check.number(op, "eps", eps, above=0)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check.dtype(op, "out_dtype", out_dtype)
    return out_dtype


def wanted(grads, needed) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for, None for the empty tensors of those that were not."""
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=False))
