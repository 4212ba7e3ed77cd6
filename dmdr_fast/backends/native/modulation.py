"""Modulated norms and gated residuals on the kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.native.library import Calls, Library, implements
from dmdr_fast.backends.rows import Grouped, mixed
from dmdr_fast.backends.views import Strided

# A block of the CUDA kernels holds a row in registers: 512 threads of 16 columns.
_LONGEST_CUDA_ROW = 8192

# dmdr_gather
_NONE, _PER_ROW, _SAMPLE, _ALL = range(4)


def refuses(x: str, *vectors: str):
    """Of a raw function whose arguments ``x`` and ``vectors`` are called so."""

    def refusal(library: Library, a) -> str | None:
        tensor = getattr(a, x)
        if library.device_type == "cuda" and tensor.shape[-1] > _LONGEST_CUDA_ROW:
            return f"it takes rows of at most {_LONGEST_CUDA_ROW} features, these have {tensor.shape[-1]}"
        return mixed(tensor, *(getattr(a, name) for name in vectors))

    return refusal


@implements("layer_norm_modulate_fwd", refuses=refuses("x", "shift", "scale"))
def layer_norm_modulate_fwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor]:
    y = run.new(a.x.shape, a.out_dtype or a.x.dtype)
    mean, rstd = (run.new(a.x.shape[:-1], torch.float32) for _ in range(2))
    g = Grouped(run, a.x, a.shift, a.scale)
    run.call(
        "layer_norm_modulate_fwd", "dmdr_layer_norm_modulate_args", shape=shape_of(g), x=rows(g, a.x),
        shift=vectors(g, a.shift), scale=vectors(g, a.scale), y=result(g, y), mean=mean, rstd=rstd, eps=a.eps,
    )  # fmt: skip
    return y, mean, rstd


@implements("layer_norm_modulate_bwd", refuses=refuses("x", "scale"))
def layer_norm_modulate_bwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor]:
    g = Grouped(run, a.x, a.scale)
    grad_x = run.new(a.x.shape if a.need_x else (0,), a.x.dtype)
    grad_shift, grad_scale = (
        run.new(a.scale.shape if a.need_modulation else (0,), dtype) for dtype in (a.shift_dtype, a.scale.dtype)
    )
    run.call(
        "layer_norm_modulate_bwd", "dmdr_layer_norm_modulate_args", shape=shape_of(g), x=rows(g, a.x),
        scale=vectors(g, a.scale), grad_y=rows(g, a.grad), grad_x=result(g, grad_x if a.need_x else None),
        grad_shift=gradient(g, a.scale, grad_shift), grad_scale=gradient(g, a.scale, grad_scale),
        mean=a.mean.contiguous(), rstd=a.rstd.contiguous(), gather=gather(g, a.scale, a.need_modulation),
        workspace=run.workspace("modulation", g.groups, g.tokens, g.width, 2),
    )  # fmt: skip
    return grad_x, grad_shift, grad_scale


@implements("gated_residual_fwd", refuses=refuses("x", "gate"))
def gated_residual_fwd(run: Calls, a) -> Tensor:
    residual = run.new(a.x.shape, a.x.dtype)
    g = Grouped(run, a.x, a.gate)
    run.call(
        "gated_residual_fwd", "dmdr_gated_residual_args", shape=shape_of(g), x=rows(g, a.x), h=rows(g, a.h),
        gate=vectors(g, a.gate), residual=result(g, residual),
    )  # fmt: skip
    return residual


@implements(
    "gated_residual_layer_norm_modulate_fwd",
    entry="gated_residual_fwd",
    refuses=refuses("x", "gate", "shift", "scale"),
)
def gated_residual_layer_norm_modulate_fwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual, y = run.new(a.x.shape, a.x.dtype), run.new(a.x.shape, a.out_dtype or a.x.dtype)
    mean, rstd = (run.new(a.x.shape[:-1], torch.float32) for _ in range(2))
    g = Grouped(run, a.x, a.gate, a.shift, a.scale)
    run.call(
        "gated_residual_fwd", "dmdr_gated_residual_args", shape=shape_of(g), x=rows(g, a.x), h=rows(g, a.h),
        gate=vectors(g, a.gate), shift=vectors(g, a.shift), scale=vectors(g, a.scale),
        residual=result(g, residual), y=result(g, y), mean=mean, rstd=rstd, eps=a.eps,
    )  # fmt: skip
    return residual, y, mean, rstd


@implements("gated_residual_bwd", refuses=refuses("grad", "gate"))
def gated_residual_bwd(run: Calls, a) -> tuple[Tensor, Tensor]:
    g = Grouped(run, a.grad, a.gate)
    grad_h = run.new(a.h.shape if a.need_h else (0,), a.h.dtype)
    grad_gate = run.new(a.gate.shape if a.need_gate else (0,), a.gate.dtype)
    run.call(
        "gated_residual_bwd", "dmdr_gated_residual_args", shape=shape_of(g), h=rows(g, a.h),
        gate=vectors(g, a.gate), grad_residual=rows(g, a.grad), grad_h=result(g, grad_h if a.need_h else None),
        grad_gate=gradient(g, a.gate, grad_gate), gather_gate=gather(g, a.gate, a.need_gate),
        workspace=run.workspace("modulation", g.groups, g.tokens, g.width, 3),
    )  # fmt: skip
    return grad_h, grad_gate


@implements(
    "gated_residual_layer_norm_modulate_bwd",
    entry="gated_residual_bwd",
    refuses=refuses("residual", "gate", "scale"),
)
def gated_residual_layer_norm_modulate_bwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = Grouped(run, a.residual, a.gate, a.scale)
    grad_x = run.new(a.residual.shape, a.residual.dtype)
    grad_h = run.new(a.h.shape if a.need_h else (0,), a.h.dtype)
    grad_gate = run.new(a.gate.shape if a.need_gate else (0,), a.gate.dtype)
    through_y = a.need_modulation and a.grad_y is not None
    dtypes, shape = (a.shift_dtype, a.scale.dtype), a.scale.shape if a.need_modulation else (0,)
    if a.grad_y is None:  # no gradient arrives: the kernel will not write these
        grad_shift, grad_scale = (run.filled(shape, 0, dtype) for dtype in dtypes)
    else:
        grad_shift, grad_scale = (run.new(shape, dtype) for dtype in dtypes)
    run.call(
        "gated_residual_bwd", "dmdr_gated_residual_args", shape=shape_of(g), h=rows(g, a.h),
        gate=vectors(g, a.gate), scale=vectors(g, a.scale), residual=rows(g, a.residual),
        grad_residual=rows(g, a.grad_residual), grad_y=rows(g, a.grad_y), grad_x=result(g, grad_x),
        grad_h=result(g, grad_h if a.need_h else None), grad_gate=gradient(g, a.gate, grad_gate),
        grad_shift=gradient(g, a.scale, grad_shift), grad_scale=gradient(g, a.scale, grad_scale),
        mean=a.mean.contiguous(), rstd=a.rstd.contiguous(), gather_gate=gather(g, a.gate, a.need_gate),
        gather=gather(g, a.scale, through_y), workspace=run.workspace("modulation", g.groups, g.tokens, g.width, 3),
    )  # fmt: skip
    return grad_x, grad_h, grad_gate, grad_shift, grad_scale


def shape_of(g: Grouped) -> tuple[int, ...]:
    return g.groups, g.tokens, 1, 1, 1, g.width


def _strided(tensor: Tensor) -> Strided:
    """Of [1 or G, 1 or S, D]: a dimension of size 1 gets stride 0."""
    steps = zip(tensor.shape[:2], tensor.stride()[:2], strict=True)
    return Strided(tensor, tuple(0 if size == 1 else step for size, step in steps))


def rows(g: Grouped, tensor: Tensor | None) -> Strided | None:
    return None if tensor is None else _strided(g.rows(tensor))


def vectors(g: Grouped, tensor: Tensor | None) -> Strided | None:
    return None if tensor is None else _strided(g.vectors(tensor))


def result(g: Grouped, tensor: Tensor | None) -> Strided | None:
    """A contiguous tensor of x's shape."""
    return None if tensor is None else Strided(tensor, (g.tokens * g.width, g.width))


def gradient(g: Grouped, vector: Tensor, grad: Tensor) -> Strided | None:
    """A contiguous gradient of a vector; None if it is not needed."""
    if grad.numel() == 0 != vector.numel():
        return None
    groups, tokens, width = g.vector_shape(vector.shape)
    return Strided(grad, (0 if groups == 1 else tokens * width, 0 if tokens == 1 else width))


def gather(g: Grouped, vector: Tensor, needed: bool) -> int:
    """Over which rows the kernels sum."""
    groups, tokens, _ = g.vector_shape(vector.shape)
    if not needed:
        return _NONE
    if (groups, tokens) == (g.groups, g.tokens):
        return _PER_ROW
    return _SAMPLE if groups == g.groups else _ALL
