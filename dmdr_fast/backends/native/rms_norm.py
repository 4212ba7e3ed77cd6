"""RMS norms with a scale, and the gated residual of one, on the kernels of csrc/."""

from __future__ import annotations

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, implements
from dmdr_fast.backends.native.modulation import call, gather, refuses
from dmdr_fast.backends.rows import Grouped

_STRUCT = struct_of(
    "dmdr_rms_norm_scale_args",
    ("shape", "shape"),
    ("tensor", "x weight scale residual y grad_y grad_x grad_weight grad_scale"),
    ("pointer", "rstd"),
    ("double", "eps"),
    ("int", "gather_weight gather"),
    ("pointer", "workspace"),
)


@implements("rms_norm_scale_fwd", refuses=refuses("x", "scale"))
def rms_norm_scale_fwd(run: Calls, a, out) -> None:
    call(run, "rms_norm_scale_fwd", _STRUCT, a, out, Grouped(run, a.x, a.scale))


@implements("gated_residual_rms_norm_fwd", entry="rms_norm_scale_fwd", refuses=refuses("x", "gate"))
def gated_residual_rms_norm_fwd(run: Calls, a, out) -> None:
    g = Grouped(run, a.x, a.gate)
    call(run, "rms_norm_scale_fwd", _STRUCT, a, out, g, x=a.h, scale=a.gate, residual=a.x)


@implements("rms_norm_scale_bwd", refuses=refuses("x", "scale"))
def rms_norm_scale_bwd(run: Calls, a, out) -> None:
    g = Grouped(run, a.x, a.scale)
    call(
        run, "rms_norm_scale_bwd", _STRUCT, a, out, g, gather_weight=gather(g, a.weight, out.grad_weight),
        gather=gather(g, a.scale, out.grad_scale),
        workspace=run.workspace("modulation", g.groups, g.tokens, g.width, 2),
    )  # fmt: skip
