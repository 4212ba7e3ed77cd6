"""GEGLU and SwiGLU of a packed projection."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, by
from dmdr_fast.reference import Result, compute_dtype, like

Approximate = Literal["none", "tanh"]


def gelu_mul(packed: Tensor, *, approximate: Approximate = "none", gate_first: bool = False) -> Tensor:
    """value * gelu(gate) with packed = [value | gate].

    Args:
        packed: [..., 2F], any float dtype.
        approximate: "none" (erf) or "tanh", as ``torch.nn.functional.gelu``.
        gate_first: packed is [gate | value].

    Returns:
        [..., F], contiguous, in packed's dtype; computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: GEGLU (arXiv 2002.05202); diffusers' GEGLU with the default order.
    """
    check.choice("gelu_mul", "approximate", approximate, get_args(Approximate))
    return _fwd.checked("gelu_mul", packed, "gelu" if approximate == "none" else "gelu_tanh", bool(gate_first))


def silu_mul(packed: Tensor, *, gate_first: bool = False) -> Tensor:
    """value * silu(gate) with packed = [value | gate].

    Args:
        packed: [..., 2F], any float dtype.
        gate_first: packed is [gate | value], as in FLUX.2 and LLaMA's fused projections.

    Returns:
        [..., F], contiguous, in packed's dtype; computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: SwiGLU (arXiv 2002.05202); diffusers' SwiGLU with the default order.
    """
    return _fwd.checked("silu_mul", packed, "silu", bool(gate_first))


def _check(op: str, a) -> None:
    check.floating(op, "packed", a.packed)
    if a.packed.shape[-1] % 2:
        raise ValueError(f"{op}: packed: expected an even last dimension 2F, got shape {list(a.packed.shape)}")


def _formula(packed: Tensor, activation: str, gate_first: bool) -> Tensor:
    value, gate = _halves(packed, gate_first)
    return value * _activation(gate, activation)


def _formula_bwd(grad: Tensor, packed: Tensor, activation: str, gate_first: bool) -> Tensor:
    value, gate = _halves(packed, gate_first)
    grad = grad.to(value.dtype)
    grad_value, grad_gate = grad * _activation(gate, activation), grad * value * _derivative(gate, activation)
    return torch.cat((grad_gate, grad_value) if gate_first else (grad_value, grad_gate), -1)


def _halves(packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(value, gate) in the compute dtype."""
    first, second = packed.to(compute_dtype(packed)).chunk(2, -1)
    return (second, first) if gate_first else (first, second)


def _activation(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _derivative(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        gate = torch.sigmoid(x)
        return gate * (1 + x * (1 - gate))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    slope = math.sqrt(2 / math.pi)
    tanh = torch.tanh(slope * (x + 0.044715 * x.pow(3)))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope * (1 + 3 * 0.044715 * x * x)


_bwd = Raw("gated_activation_bwd", "grad_packed", lambda a: like(a.packed), _formula_bwd)
_fwd = Raw(
    "gated_activation_fwd", "out", lambda a: Result((*a.packed.shape[:-1], a.packed.shape[-1] // 2), a.packed.dtype),
    _formula, check=_check, backward=by(_bwd),
)  # fmt: skip
