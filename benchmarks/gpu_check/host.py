"""Host time of every op's call on a GPU, forward and with the backward, beside that of ``a + b``. A JSON line each.

``python -m benchmarks.gpu_check.host [op ...]``; on a CPU it times the reference, with the work in it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from benchmarks import cuda, machine
from benchmarks.measure import forced
from tests.cases import host_calls
from tests.kernels.host.measure import with_backward

CALLS, ROUNDS = 20, 7  # few enough that the queue of launches, of about a thousand, never fills


def main(names: list[str]) -> None:
    device = machine.device()
    on_gpu = device.type == "cuda"
    with device:
        a = torch.randn(4, 4)
        print(json.dumps({"call": "a + b", "us": microseconds(lambda: a + a, on_gpu)}), flush=True)
        for backend in ("triton", "cuda") if on_gpu else ("reference",):
            for name, one in host_calls().items():
                if names and name not in names:
                    continue
                with forced(backend):
                    both = with_backward(one.call, one.wrt)
                    found = {"us": [microseconds(call, on_gpu) for call in (one.call, both)]}
                    if on_gpu:
                        found["launches"] = [cuda.launches(call) for call in (one.call, both)]
                print(json.dumps({"call": name, "backend": backend, **found}), flush=True)


def microseconds(call: Callable[[], object], on_gpu: bool) -> float:
    """The least over some rounds of the time per call until it returns; the device catches up between rounds."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return round(best / CALLS * 1e6, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
