"""Every raw function of the ops in plain PyTorch: the truth in float64, and what runs where no kernel can.

The formulas lie in the files of the ops. float32, bfloat16 and float16 are computed in float32. All results are new,
contiguous tensors. PyTorch differentiates every function, any number of times and in every mode: the kernels'
derivatives are written by hand, higher ones and tangents are these formulas'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# By the name of the raw function; `ops` fills them in. Of its arguments: a tensor per result, of any dtype and layout,
# or None for one that is not needed or 0.
FUNCTIONS: dict[str, Callable[..., Any]] = {}
# Of the arguments as a named tuple: a named tuple of Result.
RESULTS: dict[str, Callable[[Any], Any]] = {}


class Result(NamedTuple):
    """A result of a raw function, a contiguous tensor.

    Attributes:
        shape: None where nobody needs it: it is an empty [0] then.
        dtype: of the tensor.
        zero: it is 0 throughout, and no backend computes it.
    """

    shape: Sequence[int] | None
    dtype: torch.dtype
    zero: bool = False


def like(tensor: Tensor, dtype: torch.dtype | None = None, *, needed: bool = True, zero: bool = False) -> Result:
    """A result of ``tensor``'s shape, and of its dtype if None."""
    return Result(tensor.shape if needed else None, dtype or tensor.dtype, zero)


def run(name: str, args: tuple) -> Any:
    """The raw function ``name`` of its named tuple of arguments.

    The dtypes are the tensors' own: autocast does not reach the matrix products.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return run(name, args)
    values, results, some = FUNCTIONS[name](*args), RESULTS[name](args), first_tensor(args)
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


def first_tensor(args: tuple) -> Tensor:
    return next(arg for arg in args if isinstance(arg, Tensor))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic and of per-sample scalars: float64 where any tensor is, else float32."""
    wide = any(isinstance(tensor, Tensor) and tensor.dtype is torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def per_sample(scalar: Tensor, like: Tensor) -> Tensor:
    """[B] viewed as [B, 1, ...] so that it broadcasts against ``like`` [B, ...]."""
    return scalar.reshape(-1, *[1] * (like.dim() - 1))
