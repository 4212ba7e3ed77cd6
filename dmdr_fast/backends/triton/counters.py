"""Counters that a launch finds 0 and leaves 0: the last program to arrive knows itself by them.

Launches of a stream run one after the other: they share its counters. Launches that are captured into a CUDA graph run
later, on any stream, and have counters of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

# By device and count, those of each stream.
_counters: dict[tuple[torch.device, int], dict[int, Tensor]] = {}
# Counters for launches that will be captured, by device: zeroed in a graph, they would be a launch more.
_spare: dict[torch.device, Tensor] = {}


def counters(count: int, device: torch.device) -> Callable[[], Tensor]:
    """Gives, for a launch now, at least ``count`` int32 counters that are 0, which it has to leave so."""
    count += -count % 4  # a start of 16 bytes, as all tensors have: kernels are compiled for it
    cuda, held = device.type == "cuda", _counters.setdefault((device, count), {})
    zeros = functools.partial(torch.zeros, dtype=torch.int32, device=device)

    def current() -> Tensor:
        if _captures(cuda):
            spare = _spare.get(device)
            if spare is None or spare.numel() < count:
                return zeros(count)
            _spare[device] = spare[count:]
            return spare[:count]
        stream = triton.runtime.driver.active.get_current_stream(device.index) if cuda else 0
        if stream not in held:
            if device not in _spare:
                _spare[device] = zeros(1 << 16)
            held[stream] = zeros(count)
        return held[stream]

    return current


def _captures(cuda: bool) -> bool:
    return cuda and torch.cuda.is_current_stream_capturing()
