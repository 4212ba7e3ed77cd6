"""Renoising and seeded noise on the kernels of csrc/."""

from __future__ import annotations

import math

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, implements, on_samples
from dmdr_fast.backends.views import Strided

_STRUCT = struct_of(
    "dmdr_renoise_args",
    ("shape", "shape"),
    ("tensor", "x0 noise out"),
    ("pointer", "alpha sigma seed"),
    ("int", "offset"),
    ("pointer", "sample_sum"),
)


@implements("normal_noise_fwd", entry="renoise_fwd")
def normal_noise_fwd(run: Calls, a, out) -> None:
    count = math.prod(a.size)
    fields = run.fields(_STRUCT, a, out, lambda noise: Strided(noise, (count,)), shape=(1, 1, 1, 1, 1, count))
    run.call("renoise_fwd", _STRUCT, fields)


on_samples("renoise_fwd", _STRUCT)
on_samples("renoise_bwd", _STRUCT, x0="grad", alpha="scale")
on_samples("renoise_scale_bwd", _STRUCT, x0="grad", noise="factor")
