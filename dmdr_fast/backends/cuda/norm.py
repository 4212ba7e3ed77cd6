"""Modulated LayerNorm on the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast import reference
from dmdr_fast.backends.cuda.library import kernel, workspace_size
from dmdr_fast.backends.views import ABSENT, row_view

# A block holds a row in registers: 512 threads of 16 columns.
_MOST_FEATURES = 8192

_space = workspace_size("modulation", 4)
_fwd = kernel("layer_norm_modulate_fwd", "dmdr_layer_norm_modulate_args")
_bwd = kernel("layer_norm_modulate_bwd", "dmdr_layer_norm_modulate_args")

# dmdr_gather
_NONE, _PER_ROW, _SAMPLE, _ALL = range(4)


def refusal_fwd(x: Tensor, *rest: object) -> str | None:
    """Why ``layer_norm_modulate_fwd`` cannot run, None where it can."""
    if x.shape[2] <= _MOST_FEATURES:
        return None
    return f"it holds rows of up to {_MOST_FEATURES} features in registers, these have {x.shape[2]}"


def refusal_bwd(grad: Tensor, x: Tensor, *rest: object) -> str | None:
    """Why ``layer_norm_modulate_bwd`` cannot run, None where it can."""
    return refusal_fwd(x)


def layer_norm_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.layer_norm_modulate_fwd`."""
    if x.numel() == 0:
        return reference.layer_norm_modulate_fwd(x, shift, scale, eps, out_dtype)
    device, (batch, rows, features) = x.device, x.shape
    y = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty((batch, rows), dtype=torch.float32) for _ in range(2))
    views = [row_view(tensor) for tensor in (x, shift, scale, y)]
    _fwd(
        device, batch, rows, 1, 1, 1, features, *[field for fields, _ in views for field in fields],
        *ABSENT, *ABSENT, *ABSENT, *ABSENT, mean.data_ptr(), rstd.data_ptr(), eps, _NONE, 0,
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
    if x.numel() == 0:
        return reference.layer_norm_modulate_bwd(grad, x, scale, mean, rstd, shift_dtype, need_x, need_modulation)
    device, (batch, rows, features) = x.device, x.shape
    gather, over_batch = _gather(scale.shape, x.shape) if need_modulation else (_NONE, False)
    grad_x = x.new_empty(x.shape) if need_x else None
    # What is summed over the batch is so in float32 and rounded once.
    dtypes = (torch.float32, torch.float32) if over_batch else (shift_dtype, scale.dtype)
    shape = x.shape if over_batch else scale.shape
    modulation = [x.new_empty(shape, dtype=dtype) if need_modulation else None for dtype in dtypes]
    size = _space(batch, rows, features, 2) if gather in (_SAMPLE, _ALL) else 0
    space = x.new_empty(size, dtype=torch.float32)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    views = [row_view(tensor) for tensor in (x, None, scale, None, grad, grad_x, *modulation)]
    _bwd(
        device, batch, rows, 1, 1, 1, features, *[field for fields, _ in views for field in fields],
        mean.data_ptr(), rstd.data_ptr(), 0.0, gather, space.data_ptr(),
    )  # fmt: skip
    if over_batch:
        modulation = [value.sum(0, keepdim=True) for value in modulation]
        modulation = [modulation[0].to(shift_dtype), modulation[1].to(scale.dtype)]
    empty = x.new_empty(0)
    return (
        empty if grad_x is None else grad_x,
        empty.to(shift_dtype) if modulation[0] is None else modulation[0],
        empty.to(scale.dtype) if modulation[1] is None else modulation[1],
    )


def _gather(shape: torch.Size, full: torch.Size) -> tuple[int, bool]:
    """Over which rows the kernels sum for modulation of ``shape`` [1|B, 1|T, D]; is the batch left to sum over?"""
    batch, rows, _ = full
    if shape[1] == rows and rows != 1:
        return _PER_ROW, shape[0] != batch
    return (_SAMPLE if shape[0] == batch else _ALL), False
