"""Modulated LayerNorm and gated residuals on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import cdiv, launch, next_power_of_2
from dmdr_fast.backends.triton.modulation import Gradient, chunks_of, finish, row_tile, rows
from dmdr_fast.kernels.gated_residual import gated_residual_bwd_kernel, gated_residual_kernel
from dmdr_fast.kernels.gated_residual_layer_norm_modulate import (
    gated_residual_layer_norm_modulate_bwd_kernel,
    gated_residual_layer_norm_modulate_kernel,
)
from dmdr_fast.kernels.layer_norm_modulate import (
    layer_norm_modulate_bwd_kernel,
    layer_norm_modulate_kernel,
)

# Tiles of the kernels without a norm: features, and rows so that a thread of 4 warps has 32 elements.
_TILE = 4096


def layer_norm_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.layer_norm_modulate_fwd`."""
    batch, tokens, width = x.shape
    y = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty((batch, tokens), dtype=torch.float32) for _ in range(2))
    launch(
        layer_norm_modulate_kernel, (batch * tokens,), rows(x), rows(shift), rows(scale), y, mean, rstd,
        tokens, eps, **row_tile(width, 64),
    )  # fmt: skip
    return y, mean, rstd


def layer_norm_modulate_bwd(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift_dtype: torch.dtype,
    need_x: bool,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.layer_norm_modulate_bwd`."""
    batch, tokens, width = x.shape
    grad_x = x.new_empty(x.shape) if need_x else None
    summed = need_modulation and scale.shape[1] != tokens
    chunks, chunk = chunks_of(batch, tokens, 512 if summed else None)
    grad_shift, grad_scale = (
        Gradient(scale.shape, dtype, x, chunks, need_modulation) for dtype in (shift_dtype, scale.dtype)
    )
    launch(
        layer_norm_modulate_bwd_kernel, (batch * chunks,), rows(grad), rows(x), rows(scale), mean.contiguous(),
        rstd.contiguous(), grad_x, grad_shift.target, grad_scale.target, tokens, chunks, chunk,
        PER_TOKEN=grad_shift.per_token, **row_tile(width, 32),
    )  # fmt: skip
    finish(grad_shift, grad_scale)
    return x.new_empty(0) if grad_x is None else grad_x, grad_shift.out, grad_scale.out


def gated_residual_fwd(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """See :func:`dmdr_fast.reference.gated_residual_fwd`."""
    batch, tokens, width = x.shape
    out = x.new_empty(x.shape)
    tile = _tile(width)
    launch(
        gated_residual_kernel, (batch * cdiv(tokens, tile["ROWS"]), cdiv(width, tile["BLOCK"])), rows(x), rows(h),
        rows(gate), out, tokens, width, PER_TOKEN=gate.shape[1] != 1, **tile,
    )  # fmt: skip
    return out


def gated_residual_bwd(grad: Tensor, h: Tensor, gate: Tensor, need_h: bool, need_gate: bool) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.gated_residual_bwd`."""
    batch, tokens, width = grad.shape
    grad_h = h.new_empty(h.shape) if need_h else None
    tile = _tile(width)
    chunks, chunk = cdiv(tokens, tile["ROWS"]), tile["ROWS"]
    if need_gate and gate.shape[1] != tokens:
        chunks, chunk = chunks_of(batch, tokens, 512)
    grad_gate = Gradient(gate.shape, gate.dtype, h, chunks, need_gate)
    launch(
        gated_residual_bwd_kernel, (batch * chunks, cdiv(width, tile["BLOCK"])), rows(grad), rows(h), rows(gate),
        grad_h, grad_gate.buffer, tokens, width, chunks, chunk, PER_TOKEN=grad_gate.per_token,
        GATE_PER_TOKEN=gate.shape[1] != 1, **tile,
    )  # fmt: skip
    finish(grad_gate)
    return h.new_empty(0) if grad_h is None else grad_h, grad_gate.out


def gated_residual_layer_norm_modulate_fwd(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.gated_residual_layer_norm_modulate_fwd`."""
    batch, tokens, width = x.shape
    residual, y = x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty((batch, tokens), dtype=torch.float32) for _ in range(2))
    launch(
        gated_residual_layer_norm_modulate_kernel, (batch * tokens,), rows(x), rows(h), rows(gate), rows(shift),
        rows(scale), residual, y, mean, rstd, tokens, eps, **row_tile(width, 64),
    )  # fmt: skip
    return residual, y, mean, rstd


def gated_residual_layer_norm_modulate_bwd(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    residual: Tensor,
    h: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift_dtype: torch.dtype,
    need_h: bool,
    need_gate: bool,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.gated_residual_layer_norm_modulate_bwd`."""
    batch, tokens, width = residual.shape
    grad_x = residual.new_empty(residual.shape)
    grad_h = h.new_empty(h.shape) if need_h else None
    through_y = need_modulation and grad_y is not None
    summed = (need_gate and gate.shape[1] != tokens) or (through_y and scale.shape[1] != tokens)
    chunks, chunk = chunks_of(batch, tokens, 384 if summed else None)  # 3 blocks of 167 registers a multiprocessor
    grad_gate = Gradient(gate.shape, gate.dtype, h, chunks, need_gate)
    grad_shift, grad_scale = (
        Gradient(scale.shape, dtype, residual, chunks, through_y) for dtype in (shift_dtype, scale.dtype)
    )
    launch(
        gated_residual_layer_norm_modulate_bwd_kernel, (batch * chunks,), rows(grad_residual), rows(grad_y),
        rows(residual), rows(h), rows(gate), rows(scale), mean.contiguous(), rstd.contiguous(), grad_x, grad_h,
        grad_gate.target, grad_shift.target, grad_scale.target, tokens, chunks, chunk,
        GATE_PER_TOKEN=grad_gate.per_token, PER_TOKEN=grad_shift.per_token, **row_tile(width, 24),
    )  # fmt: skip
    finish(grad_gate, grad_shift, grad_scale)
    modulation = grad_shift.out, grad_scale.out
    if need_modulation and grad_y is None:  # the kernel had nothing to write
        modulation = tuple(scale.new_zeros(scale.shape, dtype=dtype) for dtype in (shift_dtype, scale.dtype))
    return grad_x, h.new_empty(0) if grad_h is None else grad_h, grad_gate.out, *modulation


def _tile(width: int) -> dict[str, int]:
    """The tile of the kernels without a norm: the widest that divides the features, else the widest."""
    block = next((size for size in (1024, 512, 256) if width % size == 0), min(1024, next_power_of_2(width)))
    block = max(block, 32)
    return {"ROWS": min(_TILE // block, 16), "BLOCK": block, "num_warps": 4}
