"""What the results of a raw function are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cases import RAW, Call
from tests.raw import RawFunctions, as_tuple

reference = RawFunctions(None)
_EXACT = {name: function for raw in RAW for name, function in raw.exact.items()}
_CEILINGS = {name: ceiling for raw in RAW for name, ceiling in raw.ceilings.items()}


def exact(call: Call, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The reference's results in float64; what is computed of a rounded result starts from that result."""
    args = [_wide(arg) for arg in call.args]
    if call.name in _EXACT:
        return _EXACT[call.name](reference, args, results)
    return as_tuple(reference(call.name, *args))


def _wide(arg: object) -> object:
    if isinstance(arg, Tensor) and arg.is_floating_point():
        return arg.double()
    return torch.float64 if isinstance(arg, torch.dtype) else arg


def largest_error(call: Call, dtype: torch.dtype, ceilings: dict[torch.dtype, float]) -> float:
    """The ceiling of the dtype, or the function's own in float32."""
    return _CEILINGS.get(call.name, ceilings[dtype]) if dtype is torch.float32 else ceilings[dtype]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """In L2, infinite where NaN stands in one and not in the other (the mean of no elements is NaN in both)."""
    if not torch.equal(value.isnan(), truth.isnan()):
        return float("inf")
    value, truth = value.double().nan_to_num(), truth.nan_to_num()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))
