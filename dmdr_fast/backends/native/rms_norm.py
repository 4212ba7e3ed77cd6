"""RMS norms with a scale, and the gated residual of one, on the kernels of csrc/."""

from __future__ import annotations

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.modulation import on_rows

_STRUCT = struct_of(
    "dmdr_rms_norm_scale_args",
    ("shape", "shape"),
    ("tensor", "x weight scale residual y grad_y grad_x grad_weight grad_scale"),
    ("pointer", "rstd"),
    ("double", "eps"),
    ("int", "gather_weight gather"),
    ("pointer", "workspace"),
)

on_rows("rms_norm_scale_fwd", _STRUCT, "x scale")
on_rows("rms_norm_scale_bwd", _STRUCT, "x scale", gathers="weight scale")
on_rows("gated_residual_rms_norm_fwd", _STRUCT, "x gate", "rms_norm_scale_fwd", x="h", scale="gate", residual="x")
