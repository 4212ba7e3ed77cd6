"""The raw functions of one backend, on flat arguments: each is run, and run again by the plan of the first call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmdr_fast import ops, reference  # noqa: F401  the ops define the raw functions
from dmdr_fast.backends import Backend
from dmdr_fast.backends.plans import Live
from dmdr_fast.ops._library import RAW


class RawFunctions:
    """``functions.renoise_fwd(*args)`` on ``backend``; None is the reference.

    Attributes:
        names: of the functions that it has.
        planned: names of those whose last call left a plan, which gave the same bits.
    """

    def __init__(self, backend: Backend | None) -> None:
        self._backend = backend
        self.names = sorted(reference.FUNCTIONS if backend is None else backend.functions)
        self.planned: set[str] = set()

    def __getattr__(self, name: str) -> Callable:
        if name not in self.names:
            raise AttributeError(name)
        return lambda *args: self(name, *args)

    def __call__(self, name: str, *args: object) -> Tensor | tuple[Tensor, ...]:
        arguments = RAW[name].arguments(*args)
        if self._backend is None:
            return reference.run(name, arguments)
        apart = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        live = RAW[name].live
        if live is not None:
            apart[live] = Live(apart[live])
        results, plan = self._backend.run(name, RAW[name].arguments(*apart))
        self.planned.discard(name)
        if plan is not None:
            values = [arg.data_ptr() if isinstance(arg, Tensor) else 0 for arg in args]
            if live is not None:
                values[live] = int(args[live])
            again = plan(values)
            assert all(map(same_bits, as_tuple(results), as_tuple(again))), f"{name}: the plan gives other bits"
            self.planned.add(name)
        return results

    def supports(self, name: str, *args: object) -> str | None:
        """Why the backend cannot run it, None where it can."""
        return self._backend.refusal(name, RAW[name].arguments(*args))


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN included; of what a kernel leaves unwritten the poison is the same."""
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    return torch.equal(a, b) if not a.is_floating_point() else torch.equal(a.nan_to_num(), b.nan_to_num())
