"""GEGLU and SwiGLU on the kernels of csrc/."""

from __future__ import annotations

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, implements
from dmdr_fast.backends.rows import halves, matrix

_STRUCT = struct_of(
    "dmdr_gated_activation_args",
    ("shape", "shape"),
    ("tensor", "value gate out grad grad_value grad_gate"),
    (("gelu", "gelu_tanh", "silu"), "activation"),
)


@implements("gated_activation_fwd")
def gated_activation_fwd(run: Calls, a, out) -> None:
    value, gate = halves(run, matrix(run, a.packed), a.gate_first)
    fields = run.samples(_STRUCT, a, out, value=value, gate=gate, out=matrix(run, out.out))
    run.call("gated_activation_fwd", _STRUCT, fields)


@implements("gated_activation_bwd")
def gated_activation_bwd(run: Calls, a, out) -> None:
    (value, gate), grads = (halves(run, matrix(run, both), a.gate_first) for both in (a.packed, out.grad_packed))
    fields = run.samples(
        _STRUCT, a, out, value=value, gate=gate, grad=matrix(run, a.grad), grad_value=grads[0], grad_gate=grads[1]
    )
    run.call("gated_activation_bwd", _STRUCT, fields)
