"""Measuring on a CPU: wall time of plain calls, and a copy's bandwidth."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.timing import Readings, Run
from dmdr_fast.backends.native import Library
from dmdr_fast.ops._library import RAW

_MOST_SOURCES = 64
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_COPIED = 64 << 20  # bytes at most: beyond the caches a larger copy is no slower per byte


def cache_bytes() -> int:
    """Size of the largest cache of the first core; 64 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=64 << 20)


def run(
    function: Callable[..., tuple[Tensor, ...]],
    sets: Sequence[dict[str, Tensor]],
    wrt: tuple[str, ...],
    incoming: Sequence[tuple[Tensor, ...]],
) -> Run:
    """A timed call of ``function`` and its backward on ``sets[i]``, outputs freed outside the clock."""
    keep_freed_memory()

    def timed(index: int) -> tuple[float, float]:
        tensors, grads = sets[index % len(sets)], incoming[index % len(sets)]
        start = time.perf_counter()
        outputs = function(**tensors)
        middle = end = time.perf_counter()
        if wrt:
            results = torch.autograd.grad(outputs, [tensors[name] for name in wrt], grads)
            end = time.perf_counter()
            del results
        return middle - start, end - start

    return timed


@contextmanager
def kernel_clock() -> Iterator[list[tuple[str, float]]]:
    """A list that inside the block gets (name, seconds) of every call of a C++ kernel.

    A plan calls what was there when it was made, so none is taken into the block or out of it.
    """
    calls: list[tuple[str, float]] = []
    entry = Library.entry

    def clocked(library: Library, name: str) -> Callable[[bytearray], None]:
        kernel = entry(library, name)

        def timed(arguments: bytearray) -> None:
            start = time.perf_counter()
            kernel(arguments)
            calls.append((name, time.perf_counter() - start))

        return timed

    _forget_plans()
    try:
        with mock.patch.object(Library, "entry", clocked):
            yield calls
    finally:
        _forget_plans()


def _forget_plans() -> None:
    for raw in RAW.values():
        raw.plans.clear()


def in_kernels(run: Run, calls: list[tuple[str, float]], readings: Readings) -> Run:
    """``run``, noting in ``readings`` how long its calls were in kernels, by ``calls`` of :func:`kernel_clock`."""

    def timed(index: int) -> tuple[float, float]:
        calls.clear()
        seconds = run(index)
        readings.forward.append(sum(spent for name, spent in calls if not name.endswith("_bwd")))
        readings.total.append(sum(spent for _, spent in calls))
        return seconds

    return timed


@functools.cache
def keep_freed_memory() -> None:
    """What calls free stays with the process, where the C library can do that (glibc): they work in memory that it has.

    Otherwise large blocks go back to the system. To take them anew, zeroed, costs up to five times the op, by the state
    of the machine, so that an alternative with more of them is four times as slow on one day as on another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def copy(traffic: int, device: torch.device) -> tuple[Run, int]:
    """A call that copies: it moves about ``traffic`` bytes (read plus written), from buffers rotated past the cache.

    It is timed as the ops are, its result a new tensor.

    Returns:
        The run, and the bytes it moves.
    """
    size = max(min(traffic // 2, _COPIED), 1)
    count = min(_MOST_SOURCES, -(-cache_bytes() // size))
    sets = [{"source": torch.randn(-(-size // 4), device=device)} for _ in range(count)]
    return run(lambda source: (source.clone(),), sets, (), [()] * count), 2 * sets[0]["source"].nbytes
