"""GEGLU and SwiGLU on the CPU kernels."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.backends.cpu.library import kernel, new_output
from dmdr_fast.backends.native import OUTER
from dmdr_fast.backends.views import ABSENT, shared_view

_fwd = kernel("gated_activation_fwd", "dmdr_gated_activation_args")
_bwd = kernel("gated_activation_bwd", "dmdr_gated_activation_args")

_ACTIVATION = {"gelu": 0, "gelu_tanh": 1, "silu": 2}


def gated_activation_fwd(packed: Tensor, activation: str, gate_first: bool) -> Tensor:
    """See :func:`dmdr_fast.reference.gated_activation_fwd`."""
    value, gate = _halves(packed, gate_first)
    result = new_output(value.shape, packed.dtype)
    shape, (value, gate, out), _held = shared_view(value, gate, _at_least_2d(result))
    _fwd(*shape, *value, *gate, *out, *ABSENT, *ABSENT, *ABSENT, _ACTIVATION[activation])
    return result.reshape(*packed.shape[:-1], packed.shape[-1] // 2)


def gated_activation_bwd(grad: Tensor, packed: Tensor, activation: str, gate_first: bool) -> Tensor:
    """See :func:`dmdr_fast.reference.gated_activation_bwd`."""
    result = new_output(packed.shape, packed.dtype)
    if packed.dim() > OUTER + 1:  # views of the result, which must not be copied, have to merge
        grad, packed = grad.contiguous(), packed.contiguous()
    views = *_halves(packed, gate_first), _at_least_2d(grad), *_halves(result, gate_first)
    shape, (value, gate, grad, grad_value, grad_gate), _held = shared_view(*views)
    _bwd(*shape, *value, *gate, *ABSENT, *grad, *grad_value, *grad_gate, _ACTIVATION[activation])
    return result


def _halves(packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(value, gate), at least 2-D views."""
    first, second = _at_least_2d(packed).chunk(2, -1)
    return (second, first) if gate_first else (first, second)


def _at_least_2d(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() > 1 else tensor.unsqueeze(0)
