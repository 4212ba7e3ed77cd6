"""A network that computes in another dtype than its weights have, without a second copy of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ReadAs:
    """``with ReadAs(model, own)(dtype)``: the parameters and buffers of ``model`` that are ``own`` read as ``dtype``.

    Each is cast when a layer reads it and freed when that layer is done with it. For forwards without grad. It acts
    where a module looks its tensors up, after ZeRO-3 has gathered them, so partitioned networks, fused layers, int8
    weights (their scales are cast) and adapters are served alike; a compiled block gets a graph with the casts in it.
    What is stored does not change; other dtypes and tensor subclasses (float8) are read as they are.
    """

    def __init__(self, model: nn.Module, own: torch.dtype) -> None:
        self.own, self.members = own, {id(module) for module in model.modules()}

    @contextmanager
    def __call__(self, dtype: torch.dtype) -> Iterator[None]:
        lookup, members, own = nn.Module.__getattr__, self.members, self.own

        def cast_lookup(module: nn.Module, name: str) -> Any:
            found = lookup(module, name)
            if type(found) in (Tensor, nn.Parameter) and found.dtype == own and id(module) in members:
                return found.to(dtype)
            return found

        nn.Module.__getattr__ = cast_lookup  # type: ignore[method-assign]  # of every layer, for a while
        try:
            yield
        finally:
            nn.Module.__getattr__ = lookup  # type: ignore[method-assign]
