"""Counters that a launch finds 0 and leaves 0: the last program to arrive knows itself by them.

Launches of a stream run one after the other: they share its counters. Launches that are captured into a CUDA graph run
later, on any stream, and have counters of their own.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

_counters: dict[tuple, Tensor] = {}
# Counters for launches that will be captured, by device: zeroed in a graph, they would be a launch more.
_spare: dict[torch.device, Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """At least ``count`` int32 counters that are 0, for a launch that leaves them so."""
    count += -count % 4  # a start of 16 bytes, as all tensors have: kernels are compiled for it
    if _captures(device):
        spare = _spare.get(device)
        if spare is None or spare.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _spare[device] = spare[count:]
        return spare[:count]
    stream = triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    place = device, stream, count
    found = _counters.get(place)
    if found is None:
        if device not in _spare:
            _spare[device] = torch.zeros(1 << 16, dtype=torch.int32, device=device)
        found = _counters[place] = torch.zeros(count, dtype=torch.int32, device=device)
    return found


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
