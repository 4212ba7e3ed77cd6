"""Raw functions by name: what the reference runs, and what every backend's results look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FUNCTIONS: dict[str, Callable] = {}
# Of the arguments: a named tuple of Result. The ops fill it in.
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


def first_tensor(args: tuple) -> Tensor:
    return next(arg for arg in args if isinstance(arg, Tensor))


def implements(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function of a named tuple as the reference's ``name``.

    It returns a tensor per result, of any dtype and layout, or None for one that is not needed or 0.
    """

    def register(function: Callable) -> Callable:
        FUNCTIONS[name] = function
        return function

    return register
