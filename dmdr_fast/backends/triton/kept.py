"""What a launch leaves for the next one of its stream: counters that are 0 again, tables.

Launches of a stream run one after the other, so nothing waits. Launches that are captured into a CUDA graph run later,
on any stream: they keep nothing, and the graph has what it makes while it is captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor


def kept(make: Callable) -> Callable:
    """``make(device, *key)``, whose results are kept for each device and stream, the 256 used last."""
    remembered = functools.lru_cache(256)(lambda stream, device, *key: make(device, *key))

    @functools.wraps(make)
    def find(device: torch.device, *key):
        if device.type != "cuda":
            return remembered(0, device, *key)
        if torch.cuda.is_current_stream_capturing():
            return make(device, *key)
        return remembered(_stream(device.index), device, *key)

    find.forget = remembered.cache_clear
    return find


def _stream(index: int) -> int:
    return triton.runtime.driver.active.get_current_stream(index)


def counters(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 counters that are 0, for kernels that leave them so."""
    return _counters(device, max(1024, triton.next_power_of_2(count)))


@kept
def _counters(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
