"""GEGLU and SwiGLU on the Triton kernels."""

from __future__ import annotations

from dmdr_fast.backends.rows import halves, matrix
from dmdr_fast.backends.triton.launch import Launches, cdiv, implements, next_power_of_2
from dmdr_fast.kernels.gated_activation import gated_activation_bwd_kernel, gated_activation_kernel


@implements("gated_activation_fwd")
def gated_activation_fwd(run: Launches, a, out) -> None:
    packed = matrix(run, a.packed)
    rows, width = packed.shape[0], packed.shape[1] // 2
    grid, tile = _tiles(rows, width)
    run.launch(
        gated_activation_kernel, grid, *halves(run, packed, a.gate_first), out.out, rows, packed.stride(0), width,
        ACTIVATION=a.activation, **tile,
    )  # fmt: skip


@implements("gated_activation_bwd")
def gated_activation_bwd(run: Launches, a, out) -> None:
    grad, packed = matrix(run, a.grad), matrix(run, a.packed)
    rows, width = grad.shape
    grid, tile = _tiles(rows, width)
    run.launch(
        gated_activation_bwd_kernel, grid, grad, *halves(run, packed, a.gate_first),
        *halves(run, matrix(run, out.grad_packed), a.gate_first), rows, packed.stride(0), grad.stride(0), width,
        ACTIVATION=a.activation, **tile,
    )  # fmt: skip


def _tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile: 16 elements a thread of 4 warps, the widest rows that divide the features."""
    block = max(32, next((size for size in (2048, 1024, 512) if width % size == 0), min(1024, next_power_of_2(width))))
    height = 2048 // block
    return (cdiv(rows, height), cdiv(width, block)), {"ROWS": height, "BLOCK": block, "num_warps": 4}
