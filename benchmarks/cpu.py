"""Measuring on a CPU: wall time of plain calls, and a copy's bandwidth."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import Run
from dmdr_fast.backends.cpu import LIBRARY

_MOST_SOURCES = 64
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

    def timed(index: int) -> tuple[float, float]:
        tensors, grads = sets[index % len(sets)], incoming[index % len(sets)]
        give_back_freed_memory()
        start = time.perf_counter()
        outputs = function(**tensors)
        middle = end = time.perf_counter()
        if wrt:
            results = torch.autograd.grad(outputs, [tensors[name] for name in wrt], grads)
            end = time.perf_counter()
            del results
        return middle - start, end - start

    return timed


def give_back_freed_memory() -> None:
    """What earlier calls have freed goes back to the system, where the C library can do that (glibc).

    Without it the heap's state decides by a factor of two whether a call finds its temporaries in the cache or has to
    take them from the system anew, and that state is what the alternatives before it have left.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def copy(traffic: int, device: torch.device) -> tuple[Run, int]:
    """A call that copies: it moves about ``traffic`` bytes (read plus written), from buffers rotated past the cache.

    It is timed as the ops are and takes its result as their kernels do: anew, from the system, in huge pages.

    Returns:
        The run, and the bytes it moves.
    """
    size = max(min(traffic // 2, _COPIED), 1)
    count = min(_MOST_SOURCES, -(-cache_bytes() // size))
    sets = [{"source": torch.randn(-(-size // 4), device=device)} for _ in range(count)]

    def copied(source: Tensor) -> tuple[Tensor]:
        target = torch.empty_like(source)
        LIBRARY.functions.dmdr_cpu_expect_writes(target.data_ptr(), target.nbytes)
        return (target.copy_(source),)

    return run(copied, sets, (), [()] * count), 2 * sets[0]["source"].nbytes
