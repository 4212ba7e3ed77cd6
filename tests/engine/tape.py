"""A CUDA graph without CUDA: operations recorded with the tensors that they read and wrote, and run there again.

Like a graph it keeps every address, runs no Python when it is replayed, and reads weights where they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """The operations that ran inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, _tensors(result)))
        return result

    def replay(self) -> None:
        for operation, args, kwargs, written in self.calls:
            for old, new in zip(written, _tensors(operation(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # a view has its values
                    old.copy_(new)


def capture(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: Any = None) -> Callable[..., Tensor]:
    """``torch.cuda.make_graphed_callables`` for functions without grad."""
    function(*inputs)
    with Tape() as tape:
        output = function(*inputs)

    def replayed(*arguments: Tensor) -> Tensor:
        for static, argument in zip(inputs, arguments, strict=True):
            static.copy_(argument)
        tape.replay()
        return output.detach()

    return replayed


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
