"""GEGLU and SwiGLU on the kernels of csrc/."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, implements
from dmdr_fast.backends.views import OUTER

_STRUCT = struct_of(
    "dmdr_gated_activation_args",
    ("shape", "shape"),
    ("tensor", "value gate out grad grad_value grad_gate"),
    (("gelu", "gelu_tanh", "silu"), "activation"),
)


@implements("gated_activation_fwd")
def gated_activation_fwd(run: Calls, a, out) -> None:
    value, gate = _halves(run, a.packed, a.gate_first)
    fields = run.samples(_STRUCT, a, out, value=value, gate=gate, out=_at_least_2d(run, out.out))
    run.call("gated_activation_fwd", _STRUCT, fields)


@implements("gated_activation_bwd")
def gated_activation_bwd(run: Calls, a, out) -> None:
    grad, packed = a.grad, a.packed
    if packed.dim() > OUTER + 1:  # views of the result, which must not be copied, have to merge
        grad, packed = grad.contiguous(), packed.contiguous()
    (value, gate), written = (_halves(run, both, a.gate_first) for both in (packed, out.grad_packed))
    fields = run.samples(
        _STRUCT, a, out, value=value, gate=gate, grad=_at_least_2d(run, grad),
        grad_value=written[0], grad_gate=written[1],
    )  # fmt: skip
    run.call("gated_activation_bwd", _STRUCT, fields)


def _halves(run: Calls, packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(value, gate), at least 2-D views."""
    first, second = (run.part(half, packed) for half in _at_least_2d(run, packed).chunk(2, -1))
    return (second, first) if gate_first else (first, second)


def _at_least_2d(run: Calls, tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() > 1 else run.part(tensor.unsqueeze(0), tensor)
