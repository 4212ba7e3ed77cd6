"""Latents as the kernels see them: samples of ``count`` elements, and where each element lies.

A kernel's argument may be a named tuple; its members arrive in the kernel by name, each specialised like an argument
of its own (divisible by 16, equal to 1, absent).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Shape(NamedTuple):
    """The shape that the tensors of a call share.

    Attributes:
        count: elements of a sample.
        inner: contiguous elements of a row.
        outer: sizes of the dimensions between the batch and the row; () where a sample is one row.
    """

    count: Any
    inner: Any
    outer: Any


class View(NamedTuple):
    """A tensor of that shape: where it starts, and its strides (batch, *outer) in elements."""

    pointer: Any
    strides: Any


@triton.jit
def load_sample(view, shape, sample, i, on):
    """The elements ``i`` of a sample in float32, 0 where ``on`` is not set."""
    first = view.pointer + sample.to(tl.int64) * view.strides[0]
    if len(shape.outer) == 0:
        offsets = i
    else:
        row = i // shape.inner
        offsets = i % shape.inner
        for k in tl.static_range(len(shape.outer) - 1, -1, -1):
            offsets += row % shape.outer[k] * view.strides[k + 1]
            row = row // shape.outer[k]
    return tl.load(first + offsets, mask=on, other=0).to(tl.float32)


@triton.jit
def store_sample(pointer, shape, sample, i, value, on):
    """Write the elements ``i`` of a contiguous result, rounded once to its dtype."""
    store_as(pointer + sample.to(tl.int64) * shape.count + i, value, on)


@triton.jit
def store_as(pointer, value, on):
    """Round ``value`` once, to the dtype of what ``pointer`` points to."""
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=on)
