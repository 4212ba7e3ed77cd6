"""GEGLU and SwiGLU on the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.backends.triton.launch import cdiv, launch, next_power_of_2
from dmdr_fast.kernels.gated_activation import gated_activation_bwd_kernel, gated_activation_kernel


def gated_activation_fwd(packed: Tensor, activation: str, gate_first: bool) -> Tensor:
    """See :func:`dmdr_fast.reference.gated_activation_fwd`."""
    width = packed.shape[-1] // 2
    out = packed.new_empty((*packed.shape[:-1], width))
    packed = _matrix(packed)
    rows = packed.shape[0]
    grid, tile = _tiles(rows, width)
    launch(
        gated_activation_kernel, grid, *_halves(packed, gate_first), out, rows, packed.stride(0), width,
        ACTIVATION=activation, **tile,
    )  # fmt: skip
    return out


def gated_activation_bwd(grad: Tensor, packed: Tensor, activation: str, gate_first: bool) -> Tensor:
    """See :func:`dmdr_fast.reference.gated_activation_bwd`."""
    width = grad.shape[-1]
    out = packed.new_empty(packed.shape)
    grad, packed = _matrix(grad), _matrix(packed)
    rows = packed.shape[0]
    grid, tile = _tiles(rows, width)
    launch(
        gated_activation_bwd_kernel, grid, grad, *_halves(packed, gate_first),
        *_halves(out.view(rows, 2 * width), gate_first), rows, packed.stride(0), grad.stride(0), width,
        ACTIVATION=activation, **tile,
    )  # fmt: skip
    return out


def _matrix(tensor: Tensor) -> Tensor:
    """[..., D] as [R, D] with contiguous rows; copied only where the strides do not merge."""
    tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _halves(packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(value, gate), views."""
    first, second = packed.chunk(2, 1)
    return (second, first) if gate_first else (first, second)


def _tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile: 16 elements a thread of 4 warps, the widest rows that divide the features."""
    block = next((size for size in (2048, 1024, 512) if width % size == 0), min(1024, next_power_of_2(width)))
    block = max(block, 32)
    height = 2048 // block
    return (cdiv(rows, height), cdiv(width, block)), {"ROWS": height, "BLOCK": block, "num_warps": 4}
