"""What adaptive norms and gated residuals share: checks of shift, scale and gate, and parts of the formulas."""

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


def gated(op: str, x: Tensor, h: Tensor, gate: Tensor) -> None:
    """x [B, ..., D] is a residual stream, h a branch's output, which the gate modulates."""
    check.floating(op, "x", x, min_dim=2)
    check.like(op, "h", h, x, "x")
    modulation(op, "gate", gate, x)


def shift_and_scale(op: str, shift: Tensor, scale: Tensor, x: Tensor) -> None:
    """Both modulate x, and alike."""
    modulation(op, "shift", shift, x)
    modulation(op, "scale", scale, x)
    depths = [depth_of(vector.shape, x.shape) for vector in (shift, scale)]
    if depths[0] != depths[1]:
        what = [_what(depth, x) for depth in depths]
        raise ValueError(f"{op}: scale: expected one per {what[0]} like shift, got one per {what[1]}")


def _what(depth: int, x: Tensor) -> str:
    if depth == x.dim() - 1 and depth > 1:
        return "token"
    return ("batch", "sample", "frame")[min(depth, 2)]


def layer_norm_statistics(x: Tensor, eps: float, compute: torch.dtype) -> dict[str, Tensor]:
    """mean and rstd = 1 / sqrt(var + eps) over the last dimension, in the compute dtype."""
    x = x.to(compute)
    mean = x.mean(-1)
    rstd = torch.rsqrt((x - mean.unsqueeze(-1)).square().mean(-1) + eps)
    return {"mean": mean, "rstd": rstd}


def rms_norm_statistic(x: Tensor, eps: float, compute: torch.dtype) -> Tensor:
    """1 / sqrt(mean x^2 + eps) over the last dimension, in the compute dtype."""
    return torch.rsqrt(x.to(compute).square().mean(-1) + eps)


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """``x`` times a norm's weight [D]; None means 1."""
    return x if weight is None else x * weight.to(x.dtype)


def broadcast(vector: Tensor, x: Tensor) -> Tensor:
    """shift, scale or gate so that it broadcasts against x [B, ..., D]."""
    if vector.dim() == 2 and x.dim() > 2:
        return vector.reshape(vector.shape[0], *[1] * (x.dim() - 2), vector.shape[1])
    return vector


def summed(grad: Tensor, like: Tensor, needed: bool) -> Tensor | None:
    """``grad`` of x's shape summed to the shape of ``like``, which was broadcast: a copy; None if not needed."""
    return grad.sum_to_size(broadcast(like, grad).shape).reshape(like.shape).clone() if needed else None


def layer_norm_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale in the compute dtype, the latter two not yet summed."""
    compute = mean.dtype
    grad, rstd = grad.to(compute), rstd.unsqueeze(-1)
    normal = (x.to(compute) - mean.unsqueeze(-1)) * rstd
    inner = grad * (1 + broadcast(scale, x).to(compute))
    grad_x = rstd * (inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True))
    return grad_x, grad, grad * normal


def gate_gradients(grad: Tensor, h: Tensor, gate: Tensor, need_h: bool, need_gate: bool):
    """Gradients of h and gate from that of gate h; None if not needed."""
    grad_h = broadcast(gate, h).to(grad.dtype) * grad if need_h else None
    return grad_h, summed(grad * h.to(grad.dtype), gate, True) if need_gate else None
