"""What the tests know of every op: a file of cases each, which all suites read. A new file needs no entry anywhere."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import torch

from tests.cases._kinds import DTYPES, SEED, Call, Compiled, Draw, HostCall, Op, Raw, Sizes

FILES = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]

OPS: dict[str, Op] = {name: op for file in FILES if hasattr(file, "OPS") for name, op in file.OPS.items()}
RAW: list[Raw] = [file.RAW for file in FILES if hasattr(file, "RAW")]


def valid_calls(dtype: torch.dtype = torch.float32) -> dict[str, dict]:
    """Op name to the keyword arguments of a valid call; latents have ``dtype``."""
    return {name: op.valid(lambda *shape: torch.randn(shape).to(dtype)) for name, op in OPS.items()}


def calls(dtype: torch.dtype | None, strided: bool) -> Iterator[Call]:
    """Every raw function on every shape; ``dtype`` None mixes them. Each file draws for itself."""
    for raw in RAW:
        yield from raw.calls(Draw(dtype, strided))


def small_calls(dtype: torch.dtype | None, strided: bool) -> Iterator[Call]:
    """Every raw function, each variant once."""
    for raw in RAW:
        yield from raw.small(Draw(dtype, strided))


def large_calls() -> Iterator[Call]:
    """Calls with more elements than a kernel runs on one thread."""
    for raw in RAW:
        yield from raw.large()


def host_calls(sizes: Sizes = Sizes(), rows_only: bool = False) -> dict[str, HostCall]:  # noqa: B008
    """Calls whose host time is bounded, by the name of the op, or by that, a comma and what is special."""
    ops = [op for op in OPS.values() if op.rows or not rows_only]
    return {label: call for op in ops for label, call in op.host(sizes).items()}


__all__ = [
    "DTYPES",
    "OPS",
    "RAW",
    "SEED",
    "Call",
    "Compiled",
    "Sizes",
    "calls",
    "host_calls",
    "large_calls",
    "small_calls",
    "valid_calls",
]
