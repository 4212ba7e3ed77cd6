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

# Named in every allocation: torch.set_default_device must not move what a kernel writes.
CPU = torch.device("cpu")

# From here on a fresh output is likely to be new pages of the system, and two huge ones fit in.
_HUGE = 4 << 20


def kernel(name: str, struct_name: str) -> Callable[..., None]:
    """``dmdr_<name>`` as ``call(*fields)`` on torch's number of threads."""
    return native.function(LIBRARY, f"dmdr_{name}", struct_name, torch.get_num_threads, _no_stream)


def _no_stream() -> None:
    return None


def workspace(name: str, sizes: int, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """``dmdr_<name>_workspace`` as a function of its ``sizes`` that returns that many elements, uninitialised."""
    size = native.count(LIBRARY, f"dmdr_{name}_workspace", sizes)
    return lambda *values: torch.empty(size(*values), dtype=dtype, device=CPU)


def new_output(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor that a kernel is about to fill.

    Large ones ask for huge pages first: the allocator hands them back to the system when they are freed, and
    taking 4 KiB pages anew costs more than the kernel (renoise_bwd of 100 MB: 64 ms, 17 ms with huge pages;
    one thread, Zen 4).
    """
    output = torch.empty(shape, dtype=dtype, device=CPU)
    if output.nbytes >= _HUGE:
        LIBRARY.dmdr_cpu_expect_writes(output.data_ptr(), output.nbytes)
    return output


def new_float(shape: tuple[int, ...] | torch.Size | int) -> Tensor:
    """An uninitialised float32 tensor for statistics and small results."""
    return torch.empty(shape, dtype=torch.float32, device=CPU)


def contiguous_float(tensor: Tensor | None) -> Tensor | None:
    """Per-sample scalars as the ABI wants them."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor  # three times faster than two calls that do nothing
    return tensor.to(torch.float32).contiguous()


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
