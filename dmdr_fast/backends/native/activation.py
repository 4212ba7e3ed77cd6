"""GEGLU and SwiGLU on the kernels of csrc/."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.backends.native.library import Calls, implements
from dmdr_fast.backends.views import OUTER, shared_view

_ACTIVATION = {"gelu": 0, "gelu_tanh": 1, "silu": 2}


@implements("gated_activation_fwd")
def gated_activation_fwd(run: Calls, a) -> Tensor:
    out = run.new((*a.packed.shape[:-1], a.packed.shape[-1] // 2), a.packed.dtype)
    value, gate = _halves(run, a.packed, a.gate_first)
    view = shared_view(value, gate, _at_least_2d(run, out))
    value, gate, result = view.strided()
    run.call(
        "gated_activation_fwd", "dmdr_gated_activation_args", shape=view.shape, value=value, gate=gate, out=result,
        activation=_ACTIVATION[a.activation],
    )  # fmt: skip
    return out


@implements("gated_activation_bwd")
def gated_activation_bwd(run: Calls, a) -> Tensor:
    out = run.new(a.packed.shape, a.packed.dtype)
    grad, packed = a.grad, a.packed
    if packed.dim() > OUTER + 1:  # views of the result, which must not be copied, have to merge
        grad, packed = grad.contiguous(), packed.contiguous()
    halves = *_halves(run, packed, a.gate_first), *_halves(run, out, a.gate_first)
    view = shared_view(*halves, _at_least_2d(run, grad))
    value, gate, grad_value, grad_gate, grad = view.strided()
    run.call(
        "gated_activation_bwd", "dmdr_gated_activation_args", shape=view.shape, value=value, gate=gate, grad=grad,
        grad_value=grad_value, grad_gate=grad_gate, activation=_ACTIVATION[a.activation],
    )  # fmt: skip
    return out


def _halves(run: Calls, packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(value, gate), at least 2-D views."""
    first, second = (run.part(half, packed) for half in _at_least_2d(run, packed).chunk(2, -1))
    return (second, first) if gate_first else (first, second)


def _at_least_2d(run: Calls, tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() > 1 else run.part(tensor.unsqueeze(0), tensor)
