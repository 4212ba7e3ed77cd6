"""Interleaved timing: every alternative runs in every round, so that what drifts hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# A run of an alternative on the i-th set of inputs: (seconds of the forward, seconds of forward + backward).
Run = Callable[[int], tuple[float, float]]

SHORTEST = 1e-3  # seconds; what is faster is run several times per reading


@dataclass(frozen=True)
class Spread:
    """Median and the middle 60 % of some readings."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, readings: Sequence[float]) -> Spread:
        p20, median, p80 = np.percentile(readings, (20, 50, 80))
        return cls(float(median), float(p20), float(p80))


@dataclass(frozen=True)
class Readings:
    """Seconds per call of one alternative, round by round."""

    forward: list[float]
    total: list[float]


def wall(call: Callable[[int], object], device: torch.device) -> Run:
    """``call(i)`` timed as a whole, until the device is done."""

    def timed(index: int) -> tuple[float, float]:
        start = time.perf_counter()
        call(index)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds, seconds

    return timed


def interleave(runs: Mapping[str, Run], *, seconds: float, least: int = 3, most: int = 50) -> dict[str, Readings]:
    """Time ``runs`` A B C, B C A, C A B, ... for about ``seconds``, between ``least`` and ``most`` rounds.

    Each must have run before (compilation, first allocations). The order moves on by one in every round: none always
    follows the same other one, whose data may have filled the cache. A first round finds how often a call is repeated
    for a reading of at least a millisecond; it counts where none is.
    """
    names = list(runs)
    readings = {name: Readings([], []) for name in names}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        first = {name: runs[name](0) for name in names}
        repeats = {name: max(1, int(SHORTEST / max(total, 1e-9))) for name, (_, total) in first.items()}
        index = 0
        if set(repeats.values()) == {1}:
            _add(readings, first)
            index = 1
        while index < least or (index < most and time.perf_counter() < end):
            turn = index % len(names)
            order = names[turn:] + names[:turn]
            _add(readings, {name: _reading(runs[name], index, repeats[name]) for name in order})
            index += 1
    finally:
        gc.enable()
    return readings


def _add(readings: dict[str, Readings], of_round: Mapping[str, tuple[float, float]]) -> None:
    for name, (forward, total) in of_round.items():
        readings[name].forward.append(forward)
        readings[name].total.append(total)


def _reading(run: Run, index: int, repeats: int) -> tuple[float, float]:
    forward = total = 0.0
    for turn in range(repeats):
        seconds = run(index * repeats + turn)
        forward, total = forward + seconds[0], total + seconds[1]
    return forward / repeats, total / repeats
