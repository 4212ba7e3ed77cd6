"""Modulated LayerNorm and gated residuals on the CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.cpu.library import kernel, new_float, new_output, pointer, workspace
from dmdr_fast.backends.views import ABSENT, row_view

_space = workspace("modulation", 4)
_norm_fwd = kernel("layer_norm_modulate_fwd", "dmdr_layer_norm_modulate_args")
_norm_bwd = kernel("layer_norm_modulate_bwd", "dmdr_layer_norm_modulate_args")
_gated_fwd = kernel("gated_residual_fwd", "dmdr_gated_residual_args")
_gated_bwd = kernel("gated_residual_bwd", "dmdr_gated_residual_args")

# dmdr_gather
_NONE, _PER_ROW, _SAMPLE, _ALL = range(4)


def layer_norm_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.layer_norm_modulate_fwd`."""
    y = new_output(x.shape, out_dtype)
    mean, rstd = (new_float(x.shape[:2]) for _ in range(2))
    shape = _shape(x)
    (x, _x), (shift, _shift), (scale, _scale), (out, _) = (row_view(tensor) for tensor in (x, shift, scale, y))
    _norm_fwd(
        *shape, *x, *shift, *scale, *out, *ABSENT, *ABSENT, *ABSENT, *ABSENT,
        mean.data_ptr(), rstd.data_ptr(), eps, _NONE, 0,
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
    shape = _shape(x)
    grad_x = new_output(x.shape, x.dtype) if need_x else x.new_empty(0)
    modulation = _Vectors(scale.shape, shape, (shift_dtype, scale.dtype), need_modulation)
    space = _space(shape[0], shape[1], shape[5], 2)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    (x, _x), (scale, _scale), (grad, _grad) = (row_view(tensor) for tensor in (x, scale, grad))
    result, _ = row_view(grad_x if need_x else None)
    _norm_bwd(
        *shape, *x, *ABSENT, *scale, *ABSENT, *grad, *result, *modulation.fields[0], *modulation.fields[1],
        mean.data_ptr(), rstd.data_ptr(), 0.0, modulation.gather, space.data_ptr(),
    )  # fmt: skip
    return grad_x, *modulation.gradients()


def gated_residual_fwd(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """See :func:`dmdr_fast.reference.gated_residual_fwd`."""
    residual, _, _, _ = _gated_residual(x, h, gate, None, None, 0.0, None)
    return residual


def gated_residual_layer_norm_modulate_fwd(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.gated_residual_layer_norm_modulate_fwd`."""
    return _gated_residual(x, h, gate, shift, scale, eps, out_dtype)


def gated_residual_bwd(grad: Tensor, h: Tensor, gate: Tensor, need_h: bool, need_gate: bool) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.gated_residual_bwd`."""
    _, grad_h, grad_gate, _, _ = _gated_gradients(
        grad, None, None, h, gate, None, None, None, None, None, need_h, need_gate, False
    )
    return grad_h, grad_gate


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
    return _gated_gradients(
        grad_residual, grad_y, residual, h, gate, scale, mean, rstd, shift_dtype, residual.dtype,
        need_h, need_gate, need_modulation,
    )  # fmt: skip


def _shape(x: Tensor) -> tuple[int, ...]:
    batch, rows, features = x.shape
    return batch, rows, 1, 1, 1, features


def _gated_residual(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(residual, y, mean, rstd), the last three None without shift."""
    residual = new_output(x.shape, x.dtype)
    y = mean = rstd = None
    if shift is not None:
        y = new_output(x.shape, out_dtype)
        mean, rstd = (new_float(x.shape[:2]) for _ in range(2))
    views = [row_view(tensor) for tensor in (x, h, gate, shift, scale, residual, y)]
    _gated_fwd(
        *_shape(x), *[field for fields, _ in views for field in fields], *ABSENT * 7,
        pointer(mean), pointer(rstd), eps, _NONE, _NONE, 0,
    )  # fmt: skip
    return residual, y, mean, rstd


def _gated_gradients(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    residual: Tensor | None,
    h: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    shift_dtype: torch.dtype | None,
    x_dtype: torch.dtype | None,
    need_h: bool,
    need_gate: bool,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (if ``x_dtype``), h, gate, shift and scale."""
    shape = _shape(h)
    grad_x = h.new_empty(0) if x_dtype is None else new_output(h.shape, x_dtype)
    grad_h = new_output(h.shape, h.dtype) if need_h else h.new_empty(0)
    gates = _Vectors(gate.shape, shape, (gate.dtype,), need_gate)
    through_y = grad_y is not None
    if scale is not None:
        modulation = _Vectors(scale.shape, shape, (shift_dtype, scale.dtype), need_modulation)
        mean, rstd = mean.contiguous(), rstd.contiguous()
    else:
        modulation = _Vectors(gate.shape, shape, (gate.dtype, gate.dtype), False)
    if not through_y:
        modulation.zero()
    space = _space(shape[0], shape[1], shape[5], 3)
    inputs = [row_view(tensor) for tensor in (None, h, gate, None, scale, residual, None, grad_residual, grad_y)]
    outputs = [row_view(grad_x if x_dtype is not None else None), row_view(grad_h if need_h else None)]
    _gated_bwd(
        *shape, *[field for fields, _ in inputs + outputs for field in fields],
        *gates.fields[0], *modulation.fields[0], *modulation.fields[1],
        pointer(mean), pointer(rstd), 0.0, gates.gather, modulation.gather if through_y else _NONE, space.data_ptr(),
    )  # fmt: skip
    return grad_x, grad_h, *gates.gradients(), *modulation.gradients()


class _Vectors:
    """Gradients of modulation vectors of one shape [1|B, 1|T, D], as the kernels write them and as autograd wants them.

    The kernels sum over all rows, over those of a sample, or over none; vectors that are one per token and shared by
    the batch are written per row and summed over the batch here.
    """

    def __init__(self, shape: torch.Size, full: tuple[int, ...], dtypes: tuple[torch.dtype, ...], needed: bool) -> None:
        batch, rows = full[0], full[1]
        self._needed = needed
        self._over_batch = needed and shape[0] == 1 != batch and shape[1] == rows != 1
        if not needed:
            self.gather = _NONE
        elif self._over_batch or (shape[0] == batch and shape[1] == rows):
            self.gather = _PER_ROW
        else:
            self.gather = _SAMPLE if shape[0] == batch else _ALL
        if self._over_batch:
            self._dtypes = dtypes
            shape, dtypes = (batch, rows, full[5]), (torch.float32,) * len(dtypes)
        self._values = [new_output(shape if needed else (0,), dtype) for dtype in dtypes]
        self.fields = [row_view(value)[0] if needed else ABSENT for value in self._values]

    def zero(self) -> None:
        """No gradient arrives: the kernel will not write them."""
        for value in self._values:
            value.zero_()

    def gradients(self) -> list[Tensor]:
        if not self._over_batch:
            return self._values
        return [value.sum(0, keepdim=True).to(dtype) for value, dtype in zip(self._values, self._dtypes, strict=True)]
