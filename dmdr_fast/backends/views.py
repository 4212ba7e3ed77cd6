"""Tensors of one shape as the C ABI sees them: up to five outer dimensions and a contiguous inner one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dmdr_fast.backends.native import OUTER

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 0}
ABSENT = (0,) * (2 + OUTER)
_NO_STRIDES = (0,) * (OUTER - 1)
_NO_SIZES = (1,) * (OUTER - 1)


def shared_view(*tensors: Tensor | None) -> tuple[tuple[int, ...], list[tuple[int, ...]], tuple | list]:
    """Dimensions of tensors of one shape merged as far as their strides allow; dimension 0 is never merged.

    Views whose last dimension is contiguous are passed as they are; others, and views that keep more than five
    outer dimensions, are copied.

    Args:
        tensors: all of one shape, at least 1-D; None marks an absent one. The first is present.

    Returns:
        ``shape`` (OUTER outer sizes and the inner one), the ABI's fields of each tensor, and the tensors those point
        into: the caller holds them until the kernel returns.
    """
    first = tensors[0]
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            return _strided_view(tensors)
    batch = first.shape[0]
    inner = first.numel() // batch if batch else 0
    fields = [
        ABSENT if tensor is None else (tensor.data_ptr(), DTYPE_CODE[tensor.dtype], inner, *_NO_STRIDES)
        for tensor in tensors
    ]
    return (batch, *_NO_SIZES, inner), fields, tensors


def _strided_view(tensors: tuple[Tensor | None, ...]) -> tuple:
    present = [tensor for tensor in tensors if tensor is not None]
    shape, strides = _merge(tuple(present[0].shape), tuple(tensor.stride() for tensor in present))
    each = iter(strides)
    if shape is None:  # then `strides` says which tensors need a copy
        copied = [None if tensor is None else tensor.contiguous() if next(each) else tensor for tensor in tensors]
        return shared_view(*copied)
    fields = [
        ABSENT if tensor is None else (tensor.data_ptr(), DTYPE_CODE[tensor.dtype], *next(each)) for tensor in tensors
    ]
    return shape, fields, tensors


def row_view(tensor: Tensor | None) -> tuple[tuple[int, ...], Tensor | None]:
    """The ABI's fields of a tensor [B, T, D] whose dimensions 0 and 1 may broadcast, and the tensor they point into.

    A dimension of size 1 gets stride 0. Copied only if the last dimension is not contiguous.
    """
    if tensor is None:
        return ABSENT, None
    if tensor.stride(2) != 1 and tensor.shape[2] != 1:
        tensor = tensor.contiguous()
    (batch, rows, _), (batch_stride, row_stride, _) = tensor.shape, tensor.stride()
    strides = (0 if batch == 1 else batch_stride, 0 if rows == 1 else row_stride, 0, 0, 0)
    return (tensor.data_ptr(), DTYPE_CODE[tensor.dtype], *strides), tensor


@lru_cache(maxsize=4096)
def _merge(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> tuple:
    """(merged shape, strides per tensor), or (None, copy the tensor? per tensor)."""
    kept = [0] + [dim for dim in range(1, len(shape)) if shape[dim] != 1]
    if len(kept) == 1:
        return (shape[0], *_NO_SIZES, 1), tuple((stride[0], *_NO_STRIDES) for stride in strides)
    scattered = tuple(stride[kept[-1]] != 1 for stride in strides)
    if any(scattered) and shape[-1] == 1:  # a row is one element, wherever the next one lies
        kept.append(len(shape) - 1)
        strides = tuple((*stride[:-1], 1) for stride in strides)
    elif any(scattered):
        return None, scattered
    sizes, steps = [shape[0]], [[stride[0]] for stride in strides]
    for dim in kept[1:]:
        inward = all(step[-1] == stride[dim] * shape[dim] for step, stride in zip(steps, strides, strict=True))
        if len(sizes) > 1 and inward:
            sizes[-1] *= shape[dim]
            for step, stride in zip(steps, strides, strict=True):
                step[-1] = stride[dim]
        else:
            sizes.append(shape[dim])
            for step, stride in zip(steps, strides, strict=True):
                step.append(stride[dim])
    if len(sizes) > OUTER + 1:
        return None, (True,) * len(strides)
    padding = OUTER + 1 - len(sizes)
    merged = (*sizes[:-1], *[1] * padding, sizes[-1])
    return merged, tuple((*step[:-1], *[0] * padding) for step in steps)
