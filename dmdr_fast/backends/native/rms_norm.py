"""RMS norms with a scale, and the gated residual of one, on the kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.native.library import Calls, implements
from dmdr_fast.backends.native.modulation import gather, gradient, refuses, result, rows, shape_of, vectors
from dmdr_fast.backends.rows import Grouped


@implements("rms_norm_scale_fwd", refuses=refuses("x", "scale"))
def rms_norm_scale_fwd(run: Calls, a) -> tuple[Tensor, Tensor]:
    return _forward(run, a.x, a.weight, a.scale, None, a.eps, a.out_dtype or a.x.dtype)


@implements("gated_residual_rms_norm_fwd", entry="rms_norm_scale_fwd", refuses=refuses("x", "gate"))
def gated_residual_rms_norm_fwd(run: Calls, a) -> tuple[Tensor, Tensor]:
    return _forward(run, a.h, a.weight, a.gate, a.x, a.eps, a.x.dtype)


def _forward(
    run: Calls, x: Tensor, weight: Tensor | None, scale: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, rstd = run.new(x.shape, dtype), run.new(x.shape[:-1], torch.float32)
    g = Grouped(run, x, scale)
    run.call(
        "rms_norm_scale_fwd", "dmdr_rms_norm_scale_args", shape=shape_of(g), x=rows(g, x), weight=vectors(g, weight),
        scale=vectors(g, scale), residual=rows(g, residual), y=result(g, y), rstd=rstd, eps=eps,
    )  # fmt: skip
    return y, rstd


@implements("rms_norm_scale_bwd", refuses=refuses("x", "scale"))
def rms_norm_scale_bwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor]:
    g = Grouped(run, a.x, a.scale)
    weight, need_weight = (a.x, False) if a.weight is None else (a.weight, a.need_weight)
    grad_x = run.new(a.x.shape if a.need_x else (0,), a.x.dtype)
    grad_weight = run.new(weight.shape if need_weight else (0,), weight.dtype)
    grad_scale = run.new(a.scale.shape if a.need_scale else (0,), a.scale.dtype)
    run.call(
        "rms_norm_scale_bwd", "dmdr_rms_norm_scale_args", shape=shape_of(g), x=rows(g, a.x),
        weight=vectors(g, a.weight), scale=vectors(g, a.scale), grad_y=rows(g, a.grad),
        grad_x=result(g, grad_x if a.need_x else None), grad_weight=gradient(g, weight, grad_weight),
        grad_scale=gradient(g, a.scale, grad_scale), rstd=a.rstd.contiguous(),
        gather_weight=gather(g, weight, need_weight), gather=gather(g, a.scale, a.need_scale),
        workspace=run.workspace("modulation", g.groups, g.tokens, g.width, 2),
    )  # fmt: skip
    return grad_x, grad_weight, grad_scale
