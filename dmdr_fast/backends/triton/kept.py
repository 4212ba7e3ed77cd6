"""What a launch leaves for later ones: tables, and counters that are 0 again.

Launches of a stream run one after the other: what is kept for each stream needs no wait. Launches that are captured
into a CUDA graph run later, on any stream. They take tables that are there already, which nobody writes any more, and
have counters of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

_counters: dict[tuple, Tensor] = {}
# Counters for launches that will be captured, by device: zeroed in a graph, they would be a launch more.
_spare: dict[torch.device, Tensor] = {}


def kept(make: Callable) -> Callable:
    """``make(device, *key)`` once for each device and stream; a graph that finds none makes its own."""
    made: dict[tuple, dict] = {}

    @functools.wraps(make)
    def find(device: torch.device, *key):
        by_stream = made.setdefault((device, *key), {})
        if _captures(device):
            return next(iter(by_stream.values())) if by_stream else make(device, *key)
        stream = _stream(device)
        if stream not in by_stream:
            by_stream[stream] = make(device, *key)
        return by_stream[stream]

    find.forget = made.clear
    return find


def counters(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 counters that are 0, for a launch that leaves them so."""
    count += -count % 4  # a start of 16 bytes, as all tensors have: kernels are compiled for it
    if _captures(device):
        spare = _spare.get(device)
        if spare is None or spare.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _spare[device] = spare[count:]
        return spare[:count]
    place = device, _stream(device), triton.next_power_of_2(count)
    if place not in _counters:
        if device not in _spare:
            _spare[device] = torch.zeros(1 << 16, dtype=torch.int32, device=device)
        _counters[place] = torch.zeros(place[2], dtype=torch.int32, device=device)
    return _counters[place]


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
