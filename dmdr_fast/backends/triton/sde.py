"""SDE steps with their log-probabilities on the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import block_and_warps, cdiv, group_of, launch, samples
from dmdr_fast.backends.triton.renoise import seeded_block, windows
from dmdr_fast.kernels.sde_step import (
    sde_draw_kernel,
    sde_logprob_kernel,
    sde_square_kernel,
    sde_step_bwd_kernel,
)


def sde_step_fwd(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    next_sample: Tensor | None,
    seed: Tensor | None,
    offset: int,
    kind: str,
    eta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.sde_step_fwd`."""
    sigma, sigma_next = sigma.contiguous(), sigma_next.contiguous()
    drawn = x.new_empty(0)
    if next_sample is None:
        next_sample = drawn = _draw(x, v, sigma, sigma_next, seed, offset, kind, eta)
    mean = x.new_empty(x.shape, dtype=torch.float32)
    logprob, std = torch.empty_like(sigma), torch.empty_like(sigma)
    batch, shape, views = samples(x, v, next_sample)
    block, warps = block_and_warps(shape.count, 8, 2048)
    blocks = cdiv(shape.count, block)
    parts = x.new_empty((batch, blocks), dtype=torch.float64)
    launch(
        sde_square_kernel, (batch, blocks), *views, sigma, sigma_next, mean, parts, shape, *_angles(eta),
        KIND=kind, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    launch(
        sde_logprob_kernel, (batch,), parts, sigma, sigma_next, logprob, std, blocks, shape.count, *_angles(eta),
        KIND=kind, BLOCK=256,
    )  # fmt: skip
    return drawn, logprob, mean, std


def sde_step_bwd(
    grad_next: Tensor | None,
    grad_logprob: Tensor | None,
    grad_mean: Tensor | None,
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    next_sample: Tensor,
    kind: str,
    eta: float,
    need_x: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.sde_step_bwd`."""
    grad_x = x.new_empty(x.shape) if need_x else None
    grad_v = v.new_empty(v.shape) if need_v else None
    batch, shape, (x_view, v_view, next_view, *grads) = samples(x, v, next_sample, grad_next, grad_mean)
    block, warps = block_and_warps(shape.count, 8, 2048)
    launch(
        sde_step_bwd_kernel, (batch, cdiv(shape.count, block)), grads[0],
        None if grad_logprob is None else grad_logprob.contiguous(), grads[1], x_view, v_view, next_view,
        sigma.contiguous(), sigma_next.contiguous(), grad_x, grad_v, shape, float(shape.count), *_angles(eta),
        KIND=kind, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return x.new_empty(0) if grad_x is None else grad_x, v.new_empty(0) if grad_v is None else grad_v


def _draw(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, seed: Tensor, offset: int, kind: str, eta: float
) -> Tensor:
    """The next sample in x's dtype."""
    drawn = x.new_empty(x.shape)
    batch, shape, views = samples(x, v)
    block, warps = seeded_block(shape.count)
    launch(
        sde_draw_kernel, (batch, windows(shape.count, offset, block)), *views, sigma, sigma_next, seed.contiguous(),
        drawn, shape, offset, *_angles(eta), KIND=kind, BLOCK=block, GROUP=group_of(x.dtype), num_warps=warps,
    )  # fmt: skip
    return drawn


def _angles(eta: float) -> tuple[float, float, float]:
    """eta and what the "cps" coefficients make of it."""
    return eta, math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
