"""Modulated norms and gated residuals on the kernels of csrc/."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from dmdr_fast.backends import rows
from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, implements
from dmdr_fast.backends.rows import Grouped
from dmdr_fast.backends.views import broadcast

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


def on_rows(
    name: str, struct_name: str, tensors: str, entry: str | None = None, *, gathers: str = "", **fields: str
) -> None:
    """Register the raw function ``name`` as ``dmdr_<entry>``, its tensors as rows and as vectors of rows.

    Args:
        tensors: its arguments that make the rows' grouping: one of x's shape, then vectors.
        entry: None means ``name``.
        gathers: the vectors whose gradients a backward sums over rows; the field ``gather_<vector>``, or ``gather`` for
            the scale, says how.
        fields: arguments by field, where their names differ.
    """
    x, *vectors = tensors.split()
    longest = {"cpu": math.inf, "cuda": _LONGEST_CUDA_ROW}

    @implements(name, entry=entry, refuses=lambda on, a: rows.refuses(longest[on.device_type], x, *vectors)(a))
    def call(run: Calls, a, out) -> None:
        g = Grouped(run, *(getattr(a, tensor) for tensor in (x, *vectors)))
        given: dict[str, Any] = {field: getattr(a, argument) for field, argument in fields.items()}
        for vector in gathers.split():
            field = "gather" if vector == "scale" else f"gather_{vector}"
            given[field] = _gather(g, getattr(a, vector), getattr(out, f"grad_{vector}"))
        if gathers:
            sums = 3 if struct_name == _GATED else 2  # see abi.h
            given["workspace"] = run.workspace("modulation", g.groups, g.tokens, g.width, sums)
        given["shape"] = g.groups, g.tokens, 1, 1, 1, g.width
        made = run.fields(struct_name, a, out, lambda tensor: broadcast(g.vectors(tensor)), **given)
        run.call(entry or name, struct_name, made)


def _gather(g: Grouped, vector: Tensor, grad: Tensor | None) -> int:
    """Over which rows the kernels sum for the gradient of a vector."""
    if grad is None:
        return _NONE
    groups, tokens, _ = g.vector_shape(vector.shape)
    if (groups, tokens) == (g.groups, g.tokens):
        return _PER_ROW
    return _SAMPLE if groups == g.groups else _ALL


on_rows("layer_norm_modulate_fwd", _NORM, "x shift scale")
on_rows("layer_norm_modulate_bwd", _NORM, "x scale", gathers="scale")
on_rows("gated_residual_fwd", _GATED, "x gate")
on_rows("gated_residual_bwd", _GATED, "grad_residual gate", gathers="gate")
on_rows("gated_residual_layer_norm_modulate_fwd", _GATED, "x gate shift scale", "gated_residual_fwd")
on_rows(
    "gated_residual_layer_norm_modulate_bwd", _GATED, "residual gate scale", "gated_residual_bwd", gathers="gate scale"
)
