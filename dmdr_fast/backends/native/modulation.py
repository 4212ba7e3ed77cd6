"""Modulated norms and gated residuals on the kernels of csrc/."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dmdr_fast.backends import rows
from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, Library, implements
from dmdr_fast.backends.rows import Grouped
from dmdr_fast.backends.views import Strided

# A block of the CUDA kernels holds a row in registers: 512 threads of 16 columns.
_LONGEST_CUDA_ROW = 8192

# dmdr_gather
_NONE, _PER_ROW, _SAMPLE, _ALL = range(4)

_NORM = struct_of(
    "dmdr_layer_norm_modulate_args",
    ("shape", "shape"),
    ("tensor", "x shift scale y grad_y grad_x grad_shift grad_scale"),
    ("pointer", "mean rstd"),
    ("double", "eps"),
    ("int", "gather"),
    ("pointer", "workspace"),
)
_GATED = struct_of(
    "dmdr_gated_residual_args",
    ("shape", "shape"),
    ("tensor", "x h gate shift scale residual y grad_residual grad_y grad_x grad_h grad_gate grad_shift grad_scale"),
    ("pointer", "mean rstd"),
    ("double", "eps"),
    ("int", "gather_gate gather"),
    ("pointer", "workspace"),
)


def refuses(x: str, *vectors: str) -> Callable[[Library, Any], str | None]:
    """Of a raw function whose arguments ``x`` and ``vectors`` are called so."""
    on = {"cpu": rows.refuses(math.inf, x, *vectors), "cuda": rows.refuses(_LONGEST_CUDA_ROW, x, *vectors)}
    return lambda library, a: on[library.device_type](a)


@implements("layer_norm_modulate_fwd", refuses=refuses("x", "shift", "scale"))
def layer_norm_modulate_fwd(run: Calls, a, out) -> None:
    call(run, "layer_norm_modulate_fwd", _NORM, a, out, Grouped(run, a.x, a.shift, a.scale))


@implements("layer_norm_modulate_bwd", refuses=refuses("x", "scale"))
def layer_norm_modulate_bwd(run: Calls, a, out) -> None:
    g = Grouped(run, a.x, a.scale)
    call(
        run, "layer_norm_modulate_bwd", _NORM, a, out, g, gather=gather(g, a.scale, out.grad_scale),
        workspace=run.workspace("modulation", g.groups, g.tokens, g.width, 2),
    )  # fmt: skip


@implements("gated_residual_fwd", refuses=refuses("x", "gate"))
def gated_residual_fwd(run: Calls, a, out) -> None:
    call(run, "gated_residual_fwd", _GATED, a, out, Grouped(run, a.x, a.gate))


@implements(
    "gated_residual_layer_norm_modulate_fwd", entry="gated_residual_fwd", refuses=refuses("x", "gate", "shift", "scale")
)
def gated_residual_layer_norm_modulate_fwd(run: Calls, a, out) -> None:
    call(run, "gated_residual_fwd", _GATED, a, out, Grouped(run, a.x, a.gate, a.shift, a.scale))


@implements("gated_residual_bwd", refuses=refuses("grad_residual", "gate"))
def gated_residual_bwd(run: Calls, a, out) -> None:
    g = Grouped(run, a.grad_residual, a.gate)
    call(
        run, "gated_residual_bwd", _GATED, a, out, g, gather_gate=gather(g, a.gate, out.grad_gate),
        workspace=run.workspace("modulation", g.groups, g.tokens, g.width, 3),
    )  # fmt: skip


@implements(
    "gated_residual_layer_norm_modulate_bwd", entry="gated_residual_bwd", refuses=refuses("residual", "gate", "scale")
)
def gated_residual_layer_norm_modulate_bwd(run: Calls, a, out) -> None:
    g = Grouped(run, a.residual, a.gate, a.scale)
    call(
        run, "gated_residual_bwd", _GATED, a, out, g, gather_gate=gather(g, a.gate, out.grad_gate),
        gather=gather(g, a.scale, out.grad_scale),
        workspace=run.workspace("modulation", g.groups, g.tokens, g.width, 3),
    )  # fmt: skip


def call(run: Calls, name: str, struct_name: str, a, out, g: Grouped, /, **given: Any) -> None:
    """``dmdr_<name>`` with the tensors as rows and as vectors of rows."""
    shape = g.groups, g.tokens, 1, 1, 1, g.width
    run.call(name, struct_name, run.fields(struct_name, a, out, lambda x: _strided(g.vectors(x)), shape=shape, **given))


def _strided(tensor: Tensor) -> Strided:
    """[1 or G, 1 or S, D]: a dimension of size 1 gets stride 0."""
    steps = zip(tensor.shape[:2], tensor.stride()[:2], strict=True)
    return Strided(tensor, tuple(0 if size == 1 else step for size, step in steps))


def gather(g: Grouped, vector: Tensor, grad: Tensor | None) -> int:
    """Over which rows the kernels sum for the gradient of a vector."""
    if grad is None:
        return _NONE
    groups, tokens, _ = g.vector_shape(vector.shape)
    if (groups, tokens) == (g.groups, g.tokens):
        return _PER_ROW
    return _SAMPLE if groups == g.groups else _ALL
