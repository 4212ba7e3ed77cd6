"""GEGLU and SwiGLU of a packed projection."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define
from dmdr_fast.reference.registry import Result, like

Approximate = Literal["none", "tanh"]


class GatedActivation(NamedTuple):
    packed: Tensor
    activation: str
    gate_first: bool


class GatedActivationGrad(NamedTuple):
    grad: Tensor
    packed: Tensor
    activation: str
    gate_first: bool


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


def _check(op: str, a: GatedActivation) -> None:
    check.floating(op, "packed", a.packed)
    if a.packed.shape[-1] % 2:
        raise ValueError(f"{op}: packed: expected an even last dimension 2F, got shape {list(a.packed.shape)}")


def _save(ctx, a: GatedActivation, result) -> None:
    ctx.save_for_backward(a.packed)
    ctx.options = a.activation, a.gate_first


def _backward(ctx, needed: GatedActivation, grad) -> dict:
    return {"packed": _bwd(grad, *ctx.saved_tensors, *ctx.options)}


_bwd = define("gated_activation_bwd", GatedActivationGrad, "grad_packed", lambda a: like(a.packed))
_fwd = define(
    "gated_activation_fwd", GatedActivation, "out",
    lambda a: Result((*a.packed.shape[:-1], a.packed.shape[-1] // 2), a.packed.dtype),
    check=_check, save=_save, backward=_backward,
)  # fmt: skip
