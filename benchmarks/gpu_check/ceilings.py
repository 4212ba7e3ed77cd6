"""What the device can do at most: a copy, matrix products, and the rate of launches. A JSON line each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import machine
from benchmarks.timing import Spread

ROUNDS = 10
LAUNCHES = 200


def main() -> None:
    device = machine.device()
    large = device.type == "cuda"
    print(json.dumps(machine.description()), flush=True)
    elements = 2**30 if large else 2**22
    source, target = (torch.ones(elements, dtype=torch.bfloat16, device=device) for _ in range(2))
    rate = 2 * source.nbytes / seconds(partial(target.copy_, source), device) / 1e9
    _tell("copy", rate, "GB/s, read and written")
    side = 8192 if large else 128
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rate = 2 * side**3 / seconds(partial(torch.mm, a, b), device) / 1e12
        _tell(f"matmul {str(dtype).removeprefix('torch.')}", rate, f"TFLOP/s at {side}")
    small = torch.zeros(16, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            small.add_(1)

    _tell("launch", seconds(launches, device) / LAUNCHES * 1e6, "us, of a PyTorch addition of 16 numbers")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of ``call`` with all that it starts on the device."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once(), once()
    return Spread.of([once() for _ in range(ROUNDS)]).median


def _tell(name: str, value: float, unit: str) -> None:
    print(json.dumps({"ceiling": name, "value": round(value, 2), "unit": unit}), flush=True)


if __name__ == "__main__":
    main()
