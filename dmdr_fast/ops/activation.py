"""GEGLU and SwiGLU of a packed projection."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define


def gelu_mul(packed: Tensor, *, approximate: str = "none", gate_first: bool = False) -> Tensor:
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
    op = "gelu_mul"
    _check_packed(op, packed)
    check.choice(op, "approximate", approximate, ("none", "tanh"))
    return _gated_activation_fwd(packed, "gelu" if approximate == "none" else "gelu_tanh", bool(gate_first))


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
    op = "silu_mul"
    _check_packed(op, packed)
    return _gated_activation_fwd(packed, "silu", bool(gate_first))


def _check_packed(op: str, packed: Tensor) -> None:
    check.floating(op, "packed", packed)
    if packed.shape[-1] % 2:
        raise ValueError(f"{op}: packed: expected an even last dimension 2F, got shape {list(packed.shape)}")


def _save(ctx, inputs, output):
    packed, activation, gate_first = inputs
    ctx.save_for_backward(packed)
    ctx.options = activation, gate_first


def _backward(ctx, grad):
    return _gated_activation_bwd(grad, *ctx.saved_tensors, *ctx.options), None, None


_gated_activation_bwd = define(
    "gated_activation_bwd(Tensor grad, Tensor packed, str activation, bool gate_first) -> Tensor",
    lambda grad, packed, activation, gate_first: packed.new_empty(packed.shape),
)
_gated_activation_fwd = define(
    "gated_activation_fwd(Tensor packed, str activation, bool gate_first) -> Tensor",
    lambda packed, activation, gate_first: packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2)),
    setup_context=_save,
    backward=_backward,
)
