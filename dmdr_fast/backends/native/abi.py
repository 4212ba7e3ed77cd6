"""The C ABI of the kernel libraries of csrc/: their argument structs, and filling them in.

The structs of ``csrc/include/dmdr/abi.h`` hold eight-byte fields only: any field's place is its number times eight.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmdr_fast.backends.plans import Live
from dmdr_fast.backends.views import OUTER

VERSION = 2

# Eight-byte words of a field where it is more than one.
_WORDS: dict[object, int] = {"shape": OUTER + 1, "tensor": 2 + OUTER}

# The argument structs by name, field by field in the header's order after `size` and `num_threads`: kind and names.
STRUCTS: dict[str, tuple[tuple[str | tuple[str, ...], str], ...]] = {}


def struct_of(name: str, *fields: tuple[str | tuple[str, ...], str]) -> str:
    """Register an argument struct of the header; its name.

    Args:
        fields: (kind, names) in order. "shape", "tensor", "pointer", "int", "double" as :func:`packed` says, or an enum
            as the tuple of what Python calls its values.
    """
    STRUCTS[name] = fields
    return name


DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 0}


class Pointer(NamedTuple):
    """A field that each call fills in: ``source`` is a tensor, whose data it points to, or a :class:`Live` int."""

    position: int
    source: Tensor | Live
    offset: int = 0


def packed(struct_name: str, fields: dict[str, Any]) -> tuple[bytearray, list[Pointer]]:
    """The bytes of an argument struct, zero where a pointer goes and where nothing is said, and its pointers.

    Args:
        fields: by name. "shape" takes six ints, "tensor" a :class:`~dmdr_fast.backends.views.Strided` or None,
            "pointer" a tensor, None or (tensor, bytes from its start), "int" and "double" a number, an enum one of its
            values. What is left out is zero.
    """
    data, pointers, fields = bytearray(16), [], dict(fields)
    for kind, names in STRUCTS[struct_name]:
        for name in names.split():
            value = fields.pop(name, None)
            position = len(data)
            data += bytes(8 * _WORDS.get(kind, 1))
            if value is None:
                continue
            if kind == "pointer":
                pointers.append(Pointer(position, *(value if isinstance(value, tuple) else (value,))))
                continue
            if kind == "tensor":
                pointers.append(Pointer(position, value.tensor))
                position, value = position + 8, (DTYPE_CODE[value.tensor.dtype], *value.strides)
            elif isinstance(value, Live):
                pointers.append(Pointer(position, value))
            elif isinstance(kind, tuple):
                value = kind.index(value)
            numbers = value if isinstance(value, tuple) else (value,)
            struct.pack_into(f"={len(numbers)}{'d' if kind == 'double' else 'q'}", data, position, *numbers)
    assert not fields, f"{struct_name} has no {', '.join(fields)}"
    struct.pack_into("=q", data, 0, len(data))
    return data, pointers
