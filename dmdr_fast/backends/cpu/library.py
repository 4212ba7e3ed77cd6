"""libdmdr_cpu, loaded once, and the memory its kernels write."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from dmdr_fast.backends import native

LIBRARY = native.load("dmdr_cpu")
LIBRARY.dmdr_cpu_level.restype = ctypes.c_char_p
LIBRARY.dmdr_cpu_expect_writes.argtypes = (ctypes.c_void_p, ctypes.c_int64)
LIBRARY.dmdr_cpu_expect_writes.restype = None

# From here on a fresh output is likely to be new pages of the system, and two huge ones fit in.
_HUGE = 4 << 20


def kernel(name: str, struct_name: str) -> Callable[..., None]:
    """``dmdr_<name>`` as ``call(*fields)`` on torch's number of threads."""
    call = native.function(LIBRARY, f"dmdr_{name}", struct_name)
    threads = torch.get_num_threads

    def run(*fields: float) -> None:
        call(None, threads(), *fields)

    return run


def workspace(name: str, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """``dmdr_<name>_workspace`` as a function of its sizes that returns that many elements, uninitialised."""
    size = native.count(LIBRARY, f"dmdr_{name}_workspace")
    return lambda *sizes: torch.empty(size(*sizes), dtype=dtype)


def new_output(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor that a kernel is about to fill.

    Large ones ask for huge pages first: allocators hand memory beyond 32 MB back to the system, and taking
    4 KiB pages anew costs more than the kernel (a 100 MB output: 35 ms of faults, 8 ms with huge pages; 2 cores).
    """
    output = torch.empty(shape, dtype=dtype)
    if output.nbytes >= _HUGE:
        LIBRARY.dmdr_cpu_expect_writes(output.data_ptr(), output.nbytes)
    return output


def contiguous_float(tensor: Tensor | None) -> Tensor | None:
    """Per-sample scalars as the ABI wants them; a no-op for what the public ops pass."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
