"""RMS norms with a scale, and the gated residual of one, on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.rows import Grouped
from dmdr_fast.backends.triton.launch import Launches, implements
from dmdr_fast.backends.triton.modulation import Gradient, allocate, chunks_of, finish, refuses, row_tile, rows
from dmdr_fast.kernels.gated_residual_rms_norm import gated_residual_rms_norm_kernel
from dmdr_fast.kernels.rms_norm_scale import rms_norm_scale_bwd_kernel, rms_norm_scale_kernel


@implements("rms_norm_scale_fwd", refuses=refuses("x", "scale"))
def rms_norm_scale_fwd(run: Launches, a) -> tuple[Tensor, Tensor]:
    y, rstd = run.new(a.x.shape, a.out_dtype or a.x.dtype), run.new(a.x.shape[:-1], torch.float32)
    g = Grouped(run, a.x, a.scale)
    run.launch(
        rms_norm_scale_kernel, (g.groups * g.tokens,), rows(g.rows(a.x)), rows(g.vectors(a.weight)),
        rows(g.vectors(a.scale)), y, rstd, g.tokens, float(a.eps), **row_tile(g.width, 64),
    )  # fmt: skip
    return y, rstd


@implements("rms_norm_scale_bwd", refuses=refuses("x", "scale"))
def rms_norm_scale_bwd(run: Launches, a) -> tuple[Tensor, Tensor, Tensor]:
    g = Grouped(run, a.x, a.scale)
    grad_x = run.new(a.x.shape if a.need_x else (0,), a.x.dtype)
    # A weight is a scale that all samples and tokens share.
    weight = a.x.new_empty(0) if a.weight is None else a.weight
    grad_weight = Gradient(g, weight, weight.dtype, a.need_weight)
    grad_scale = Gradient(g, a.scale, a.scale.dtype, a.need_scale)
    chunks, chunk = chunks_of(g, 512 if grad_weight.summed or grad_scale.summed else None)
    allocate(run, g, chunks, grad_weight, grad_scale)
    run.launch(
        rms_norm_scale_bwd_kernel, (g.groups * chunks,), rows(g.rows(a.grad)), rows(g.rows(a.x)),
        rows(g.vectors(a.weight)), rows(g.vectors(a.scale)), a.rstd.contiguous(), grad_x if a.need_x else None,
        grad_weight.target, grad_scale.target, g.tokens, chunks, chunk, PER_TOKEN=grad_scale.per_token,
        **row_tile(g.width, 32),
    )  # fmt: skip
    finish(run, grad_weight, grad_scale)
    return grad_x, grad_weight.out, grad_scale.out


@implements("gated_residual_rms_norm_fwd", refuses=refuses("x", "gate"))
def gated_residual_rms_norm_fwd(run: Launches, a) -> tuple[Tensor, Tensor]:
    y, rstd = run.new(a.x.shape, a.x.dtype), run.new(a.x.shape[:-1], torch.float32)
    g = Grouped(run, a.x, a.gate)
    run.launch(
        gated_residual_rms_norm_kernel, (g.groups * g.tokens,), rows(g.rows(a.x)), rows(g.rows(a.h)),
        rows(g.vectors(a.weight)), rows(g.vectors(a.gate)), y, rstd, g.tokens, float(a.eps), **row_tile(g.width, 64),
    )  # fmt: skip
    return y, rstd
