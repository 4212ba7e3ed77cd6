"""Checks of shift, scale and gate of adaptive norms."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.rows import depth_of
from dmdr_fast.ops import _checks as check


def modulation(op: str, name: str, value: Tensor, x: Tensor) -> None:
    """shift, scale or gate of x [B, ..., D]: [D], [B, D], or x's shape with ones in place of its last middle sizes."""
    check.floating(op, name, value)
    check.on_device(op, name, value, x, "x")
    shape, full = tuple(value.shape), tuple(x.shape)
    if shape in ((full[-1],), (full[0], full[-1])):
        return
    width, middle = full[-1], full[1:-1]
    allowed = [(full[0], *middle[:depth], *[1] * (len(middle) - depth), width) for depth in range(len(middle) + 1)]
    if shape not in allowed:
        given = ", ".join(str(list(one)) for one in ((width,), (full[0], width), *allowed[:-1]))
        raise ValueError(f"{op}: {name}: expected shape {given} or x's {list(full)}, got {list(shape)}")


def shift_and_scale(op: str, shift: Tensor, scale: Tensor, x: Tensor) -> None:
    """Both modulate x, and alike."""
    modulation(op, "shift", shift, x)
    modulation(op, "scale", scale, x)
    depths = [depth_of(vector.shape, x.shape) for vector in (shift, scale)]
    if depths[0] != depths[1]:
        what = [_what(depth, x) for depth in depths]
        raise ValueError(f"{op}: scale: expected one per {what[0]} like shift, got one per {what[1]}")


def norm_options(op: str, eps: float, out_dtype: torch.dtype | None) -> None:
    check.number(op, "eps", eps, above=0)
    if out_dtype is not None:
        check.dtype(op, "out_dtype", out_dtype)


def _what(depth: int, x: Tensor) -> str:
    if depth == x.dim() - 1 and depth > 1:
        return "token"
    return ("batch", "sample", "frame")[min(depth, 2)]
