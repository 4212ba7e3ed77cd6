"""Host time of every op's call on a GPU, forward and with the backward, beside that of ``a + b``. A JSON line each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from benchmarks import cuda
from benchmarks.measure import forced
from tests.kernels.host.measure import calls, with_backward

CALLS, ROUNDS = 20, 7  # few enough that the queue of launches, of about a thousand, never fills


def main() -> None:
    with torch.device("cuda"):
        a = torch.randn(4, 4)
        print(json.dumps({"call": "a + b", "us": microseconds(lambda: a + a)}), flush=True)
        for backend in ("triton", "cuda"):
            for name, (forward, wrt) in calls().items():
                with forced(backend):
                    both = with_backward(forward, wrt)
                    found = {
                        "us": [microseconds(call) for call in (forward, both)],
                        "launches": [cuda.launches(call) for call in (forward, both)],
                    }
                print(json.dumps({"call": name, "backend": backend, **found}), flush=True)


def microseconds(call: Callable[[], object]) -> float:
    """The least over some rounds of the time per call until it returns; the device catches up between rounds."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return round(best / CALLS * 1e6, 1)


if __name__ == "__main__":
    main()
