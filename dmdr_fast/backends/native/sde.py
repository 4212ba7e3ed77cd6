"""SDE steps with their log-probabilities on the kernels of csrc/."""

from __future__ import annotations

import math

import torch

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, implements, on_samples

_STRUCT = struct_of(
    "dmdr_sde_step_args",
    ("shape", "shape"),
    ("tensor", "x v next_sample mean grad_next grad_mean grad_x grad_v"),
    ("pointer", "sigma sigma_next seed"),
    ("int", "offset"),
    (("flow_grpo", "dance", "cps"), "kind"),
    ("double", "eta"),
    ("pointer", "logprob std grad_logprob workspace"),
)


@implements("sde_step_fwd")
def sde_step_fwd(run: Calls, a, out) -> None:
    fields = run.samples(_STRUCT, a, out, next_sample=out.drawn if a.next_sample is None else a.next_sample)
    *outer, inner = fields["shape"]
    space = run.workspace("sde_step", math.prod(outer), inner, dtype=torch.float64)
    run.call("sde_step_fwd", _STRUCT, fields | {"workspace": space})


on_samples("sde_step_bwd", _STRUCT)
