"""Plans of Triton's kernels in the interpreter, so that they are tested there too: tensors are made of the pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.backends.plans import Live


def make_repeatable() -> None:
    """Let launches of this process be noted, as those of a GPU are."""
    from dmdr_fast.backends.triton.launch import Launches

    launch = Launches.launch

    def noted(run: Launches, kernel: Any, grid: tuple, *args: Any, num_warps: int = 4, **constants: Any) -> None:
        repeatable = run._repeatable
        launch(run, kernel, grid, *args, num_warps=num_warps, **constants)
        run._repeatable = repeatable
        made = _rebuilt(run, tuple(args))
        run.note(lambda pointers: kernel[grid](*made(pointers), **constants))

    Launches.launch = noted


def _rebuilt(run: Any, value: Any) -> Callable[[list[int]], Any]:
    """``value`` of another call, of its pointers and ints."""
    if isinstance(value, tuple):
        parts = [_rebuilt(run, part) for part in value]
        make = getattr(type(value), "_make", tuple)
        return lambda pointers: make(part(pointers) for part in parts)
    if isinstance(value, Tensor):
        place, offset = run.place(value) or (0, 0)
        dtype = value.dtype
        return lambda pointers: _at(pointers[place] + offset, dtype)
    if isinstance(value, Live):
        place = value.place
        return lambda pointers: pointers[place]
    return lambda pointers: value


def _at(pointer: int, dtype: torch.dtype) -> Tensor:
    """The element at an address: all that the interpreter asks of a tensor is where it starts."""
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(pointer), dtype=dtype)
