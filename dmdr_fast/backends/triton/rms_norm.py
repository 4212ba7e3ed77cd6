"""RMS norms with a scale per sample or token, and the gated residual of one, on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import launch
from dmdr_fast.backends.triton.modulation import Gradient, chunks_of, finish, row_tile, rows
from dmdr_fast.kernels.gated_residual_rms_norm import gated_residual_rms_norm_kernel
from dmdr_fast.kernels.rms_norm_scale import rms_norm_scale_bwd_kernel, rms_norm_scale_kernel
from dmdr_fast.kernels.rows import Rows


def rms_norm_scale_fwd(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x rstd weight scale, rstd [B, T] = 1 / sqrt(mean x^2 + eps)) of x [B, T, D]."""
    batch, tokens, width = x.shape
    y, rstd = x.new_empty(x.shape, dtype=out_dtype), x.new_empty((batch, tokens), dtype=torch.float32)
    launch(
        rms_norm_scale_kernel, (batch * tokens,), rows(x), _weight(weight), rows(scale), y, rstd, tokens, eps,
        **row_tile(width, 64),
    )  # fmt: skip
    return y, rstd


def gated_residual_rms_norm_fwd(
    x: Tensor, h: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate (h rstd weight), rstd [B, T] = 1 / sqrt(mean h^2 + eps)) of x and h [B, T, D]."""
    batch, tokens, width = x.shape
    y, rstd = x.new_empty(x.shape), x.new_empty((batch, tokens), dtype=torch.float32)
    launch(
        gated_residual_rms_norm_kernel, (batch * tokens,), rows(x), rows(h), _weight(weight), rows(gate), y, rstd,
        tokens, eps, **row_tile(width, 64),
    )  # fmt: skip
    return y, rstd


def rms_norm_scale_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and scale; an empty [0] for one that is not needed.

    With h for x and gate for scale those of ``gated_residual_rms_norm``, whose gradient of x is ``grad``.
    """
    batch, tokens, width = x.shape
    grad_x = x.new_empty(x.shape) if need_x else None
    per_token = scale is not None and scale.shape[1] == tokens
    summed = need_weight or (need_scale and not per_token)
    chunks, chunk = chunks_of(batch, tokens, 512 if summed else None)
    # A weight is a scale that all samples and tokens share.
    weight_like, scale_like = (x.new_empty(0) if value is None else value for value in (weight, scale))
    grad_weight = Gradient(torch.Size((1, 1, width)), weight_like.dtype, x, chunks, need_weight)
    grad_scale = Gradient(scale_like.shape if need_scale else x.shape, scale_like.dtype, x, chunks, need_scale)
    launch(
        rms_norm_scale_bwd_kernel, (batch * chunks,), rows(grad), rows(x), _weight(weight), rows(scale),
        rstd.contiguous(), grad_x, grad_weight.target, grad_scale.target, tokens, chunks, chunk, PER_TOKEN=per_token,
        **row_tile(width, 32),
    )  # fmt: skip
    finish(grad_weight, grad_scale)
    return x.new_empty(0) if grad_x is None else grad_x, grad_weight.out.flatten(), grad_scale.out


def _weight(weight: Tensor | None) -> Rows | None:
    return None if weight is None else rows(weight.view(1, 1, -1))
