"""Every op once, forward and backward, on each kernel backend of the device: what the sanitizer and ncu look at.

``python -m benchmarks.gpu_check.once [--large] [op ...]``; ``--large`` takes the row kernels at a transformer's size.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import machine
from benchmarks.measure import forced
from tests.cases import Sizes, host_calls
from tests.kernels.host.measure import with_backward


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true")
    parser.add_argument("ops", nargs="*")
    options = parser.parse_args()
    device = machine.device()
    torch.manual_seed(0)
    # SD3.5-Medium's tokens at 1024 pixels; fewer on a CPU.
    large = Sizes(4, 4096, 1536, 24) if device.type == "cuda" else Sizes(1, 64, 1536, 24)
    for backend in ("triton", "cuda") if device.type == "cuda" else ("reference",):
        with forced(backend), torch.device(device):
            for name, one in (host_calls(large, rows_only=True) if options.large else host_calls()).items():
                if not options.ops or name in options.ops:
                    with_backward(one.call, one.wrt)()
                    print(backend, name, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
