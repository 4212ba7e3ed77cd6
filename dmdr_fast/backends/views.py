"""Tensors of one shape as the kernels see them: up to five outer dimensions and a contiguous inner one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

OUTER = 5
_NO_STRIDES = (0,) * (OUTER - 1)
_NO_SIZES = (1,) * (OUTER - 1)


class Strided(NamedTuple):
    """A tensor and its strides along the outer dimensions, in elements."""

    tensor: Tensor
    strides: Sequence[int]


def with_rows(tensor: Tensor) -> Tensor:
    """``tensor``; a copy only if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strided(tensor: Tensor) -> Strided:
    """All but the last dimension are outer ones; copied only if the last one is not contiguous."""
    rows = with_rows(tensor)
    return Strided(rows, rows.stride()[:-1])


def broadcast(tensor: Tensor) -> Strided:
    """A view of which all but the last dimension are outer ones, one of size 1 with stride 0."""
    steps = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return Strided(tensor, tuple(0 if size == 1 else step for size, step in steps))


def table(tensor: Tensor | None) -> Strided | None:
    """cos or sin [T, D] or [B, T, D] with the strides of B, 0 where it is one for the whole batch, and of T."""
    if tensor is None:
        return None
    rows = with_rows(tensor)
    return Strided(rows, (0 if rows.dim() == 2 or rows.shape[0] == 1 else rows.stride(0), rows.stride(-2)))


def shared_view(*tensors: Tensor | None) -> tuple[tuple[int, ...], list[Strided | None]]:
    """(OUTER outer sizes and the inner one, views) of tensors of one shape; dimension 0 is never merged.

    The other dimensions are merged as far as the strides allow. Views whose last dimension is contiguous are taken as
    they are; others, and views that keep more than five outer dimensions, are copied.

    Args:
        tensors: all of one shape, at least 1-D; None marks an absent one. One is present.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    shape, strides = _merge(tuple(present[0].shape), tuple(tensor.stride() for tensor in present))
    each = iter(strides)
    if shape is None:  # then `strides` says which tensors need a copy
        return shared_view(
            *(None if tensor is None else tensor.contiguous() if next(each) else tensor for tensor in tensors)
        )
    return shape, [None if tensor is None else Strided(tensor, next(each)) for tensor in tensors]


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
