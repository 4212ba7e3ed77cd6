"""Tensors whose last byte is followed by a page that nobody may touch: a read or write beyond them is a fault."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0
_ALIGNMENT = 16


def fenced(tensor: Tensor) -> Tensor:
    """A copy with the same sizes, strides and address modulo 16; what lies between its elements is copied too."""
    if tensor.numel() == 0:
        return tensor
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    copy = _region(count * tensor.element_size(), tensor.data_ptr() % _ALIGNMENT).view(tensor.dtype)
    copy.copy_(tensor.as_strided((count,), (1,)))
    return copy.as_strided(tensor.shape, tensor.stride())


def fenced_empty_strided(shape: tuple, strides: tuple, dtype: torch.dtype) -> Tensor:
    """A tensor of contiguous strides, with a fence; the memory is NaN (0xff in every byte)."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return _region(count * dtype.itemsize, 0).view(dtype).view(shape)


def _region(size: int, misalignment: int) -> Tensor:
    """``size`` bytes of 0xff that end less than 16 bytes before the fence."""
    pages = -(-(size + _ALIGNMENT) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    fence = pages * mmap.PAGESIZE
    start = fence - size - (fence - size - misalignment) % _ALIGNMENT
    whole[:fence].fill_(0xFF)
    if _LIBC.mprotect(ctypes.c_void_p(whole.data_ptr() + fence), mmap.PAGESIZE, _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    return whole[start : start + size]
