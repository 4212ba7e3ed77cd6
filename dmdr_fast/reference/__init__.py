"""Every raw function of the ops in plain PyTorch: the truth in float64, and what runs where no kernel can.

float32, bfloat16 and float16 are computed in float32. All results are new, contiguous tensors. PyTorch differentiates
every function, any number of times and in every mode: the kernels' derivatives are written by hand, higher ones and
tangents are these formulas'.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.reference.lora import low_rank
from dmdr_fast.reference.modulate import layer_norm_statistics
from dmdr_fast.reference.noise import seeded_normals
from dmdr_fast.reference.philox import philox4x32, seeded_blocks
from dmdr_fast.reference.registry import FUNCTIONS, RESULTS, Result, first_tensor
from dmdr_fast.reference.rms_norm import rms_norm_statistic
from dmdr_fast.reference.sde_step import sde_coefficients

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def run(name: str, args: tuple) -> Any:
    """The raw function ``name`` of its named tuple of arguments.

    The dtypes are the tensors' own: autocast does not reach the matrix products.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return run(name, args)
    values, results, some = FUNCTIONS[name](args), RESULTS[name](args), first_tensor(args)
    if len(results) == 1:
        return _finished(values, results[0], some)
    return tuple(_finished(value, result, some) for value, result in zip(values, results, strict=True))


def _finished(value: Tensor | None, result: Result, some: Tensor) -> Tensor:
    if result.shape is None:
        return some.new_empty(0, dtype=result.dtype)
    if result.zero:
        return some.new_zeros(result.shape, dtype=result.dtype)
    assert value is not None, "a result that is needed"
    return value.to(result.dtype).contiguous()


__all__ = [
    "FUNCTIONS",
    "layer_norm_statistics",
    "low_rank",
    "philox4x32",
    "rms_norm_statistic",
    "run",
    "sde_coefficients",
    "seeded_blocks",
    "seeded_normals",
]
