"""Every op once, forward and backward, on each kernel backend of the device: what the sanitizer and ncu look at.

``python -m benchmarks.gpu_check.once [--large] [op ...]``; ``--large`` takes the row kernels at a transformer's size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measure import forced
from dmdr_fast import ops
from tests.kernels.host.measure import calls, with_backward


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true")
    parser.add_argument("ops", nargs="*")
    options = parser.parse_args()
    device = machine.device()
    torch.manual_seed(0)
    for backend in ("triton", "cuda") if device.type == "cuda" else ("reference",):
        with forced(backend), torch.device(device):
            for name, (forward, wrt) in (row_calls(device) if options.large else calls()).items():
                if not options.ops or name in options.ops:
                    with_backward(forward, wrt)()
                    print(backend, name, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


def row_calls(device: torch.device) -> dict[str, tuple[Callable[[], Any], list[Tensor]]]:
    """The row kernels on SD3.5-Medium's tokens at 1024 pixels (fewer on a CPU), as ``calls`` gives them."""
    batch, tokens, width, heads = (4, 4096, 1536, 24) if device.type == "cuda" else (1, 64, 1536, 24)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()

    x, h = (leaf(batch, tokens, width) for _ in range(2))
    shift, scale, gate = (leaf(batch, 1, width) for _ in range(3))
    weight, q_weight, k_weight = leaf(width), leaf(width // heads), leaf(width // heads)
    q, k = (leaf(batch, tokens, heads, width // heads) for _ in range(2))
    table, packed = torch.randn(tokens, width // heads), leaf(batch, tokens, 2 * width)
    return {
        "layer_norm_modulate": (lambda: ops.layer_norm_modulate(x, shift, scale), [x, shift, scale]),
        "gated_residual": (lambda: ops.gated_residual(x, h, gate), [x, h, gate]),
        "gated_residual_layer_norm_modulate": (
            lambda: ops.gated_residual_layer_norm_modulate(x, h, gate, shift, scale), [x, h, gate, shift, scale],
        ),
        "rms_norm_scale": (lambda: ops.rms_norm_scale(x, weight, scale), [x, weight, scale]),
        "gated_residual_rms_norm": (lambda: ops.gated_residual_rms_norm(x, h, gate, weight), [x, h, gate, weight]),
        "qk_norm_rope": (lambda: ops.qk_norm_rope(q, k, q_weight, k_weight, table, table), [q, k, q_weight, k_weight]),
        "silu_mul": (lambda: ops.silu_mul(packed), [packed]),
    }  # fmt: skip


if __name__ == "__main__":
    main()
