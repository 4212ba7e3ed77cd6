"""libdmdr_cuda, loaded once, and how its kernels reach the tensors' device and stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dmdr_fast.backends import native

try:
    LIBRARY = native.load("dmdr_cuda")
except ImportError as error:
    raise ImportError(
        f"{error}. The CUDA kernels are built where nvcc is found; DMDR_CUDA=ON insists on them"
    ) from error

# What the kernels are compiled for begins with this compute capability.
_OLDEST = (8, 0)


def kernel(name: str, struct_name: str) -> Callable[..., None]:
    """``dmdr_<name>`` as ``call(device, *fields)`` on the device's current stream."""
    call = native.function(LIBRARY, f"dmdr_{name}", struct_name, _no_threads, current_stream)

    def run(device: torch.device, *fields: float) -> None:
        # The CUDA runtime launches on the thread's current device, whatever device the pointers are of.
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                call(*fields)
        else:
            call(*fields)

    return run


def current_stream() -> int:
    """The ``cudaStream_t`` that PyTorch's own kernels would take now."""
    return torch.cuda.current_stream().cuda_stream


def _no_threads() -> int:
    return 0


def workspace_size(name: str, sizes: int) -> Callable[..., int]:
    """``dmdr_<name>_workspace`` as a function of its ``sizes``."""
    return native.count(LIBRARY, f"dmdr_{name}_workspace", sizes)


@lru_cache(maxsize=64)
def too_old(device: torch.device) -> str | None:
    """Why the device cannot run the kernels, None where it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= _OLDEST:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"its kernels need compute capability {_OLDEST[0]}.{_OLDEST[1]} or later, this device has {major}.{minor}"


def contiguous_float(tensor: Tensor | None) -> Tensor | None:
    """Per-sample scalars as the ABI wants them."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
