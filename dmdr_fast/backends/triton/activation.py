"""GEGLU and SwiGLU on the Triton kernels."""

from __future__ import annotations

import math

from torch import Tensor

from dmdr_fast.backends.triton.launch import Launches, cdiv, implements, next_power_of_2
from dmdr_fast.kernels.gated_activation import gated_activation_bwd_kernel, gated_activation_kernel


@implements("gated_activation_fwd")
def gated_activation_fwd(run: Launches, a, out) -> None:
    packed = _matrix(run, a.packed)
    rows, width = packed.shape[0], packed.shape[1] // 2
    grid, tile = _tiles(rows, width)
    run.launch(
        gated_activation_kernel, grid, *_halves(run, packed, a.gate_first), out.out, rows, packed.stride(0), width,
        ACTIVATION=a.activation, **tile,
    )  # fmt: skip


@implements("gated_activation_bwd")
def gated_activation_bwd(run: Launches, a, out) -> None:
    grad, packed = _matrix(run, a.grad), _matrix(run, a.packed)
    rows, width = grad.shape
    grid, tile = _tiles(rows, width)
    run.launch(
        gated_activation_bwd_kernel, grid, grad, *_halves(run, packed, a.gate_first),
        *_halves(run, _matrix(run, out.grad_packed), a.gate_first), rows, packed.stride(0), grad.stride(0), width,
        ACTIVATION=a.activation, **tile,
    )  # fmt: skip


def _matrix(run: Launches, tensor: Tensor) -> Tensor:
    """[..., D] as [R, D] with contiguous rows."""
    return run.view(tensor, math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _halves(run: Launches, packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(value, gate), views."""
    first, second = (run.part(half, packed) for half in packed.chunk(2, 1))
    return (second, first) if gate_first else (first, second)


def _tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile: 16 elements a thread of 4 warps, the widest rows that divide the features."""
    block = next((size for size in (2048, 1024, 512) if width % size == 0), min(1024, next_power_of_2(width)))
    block = max(block, 32)
    height = 2048 // block
    return (cdiv(rows, height), cdiv(width, block)), {"ROWS": height, "BLOCK": block, "num_warps": 4}
