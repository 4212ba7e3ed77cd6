"""GEGLU and SwiGLU in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast.reference.precision import compute_dtype
from dmdr_fast.reference.registry import implements


@implements("gated_activation_fwd")
def gated_activation_fwd(a) -> Tensor:
    """value * activation(gate) [..., F] of packed = [value | gate] (or [gate | value]) [..., 2F]."""
    value, gate = _halves(a.packed, a.gate_first)
    return value * _activation(gate, a.activation)


@implements("gated_activation_bwd")
def gated_activation_bwd(a) -> Tensor:
    """The gradient of packed."""
    value, gate = _halves(a.packed, a.gate_first)
    grad = a.grad.to(value.dtype)
    grad_value, grad_gate = grad * _activation(gate, a.activation), grad * value * _derivative(gate, a.activation)
    return torch.cat((grad_gate, grad_value) if a.gate_first else (grad_value, grad_gate), -1)


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
