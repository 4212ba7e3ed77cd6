"""Seeded normals and renoising in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dmdr_fast.reference.philox import seeded_blocks
from dmdr_fast.reference.precision import compute_dtype, per_sample
from dmdr_fast.reference.registry import implements


@implements("normal_noise_fwd")
def normal_noise_fwd(a) -> Tensor:
    """N(0, 1) of shape ``size``; see :func:`dmdr_fast.ops.normal_noise` for the stream."""
    return seeded_normals(a.size, a.seed, a.offset, a.dtype)


def seeded_normals(size: Sequence[int], seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """The stream's normals: Box-Muller in float64, rounded once: the value every backend is compared with."""
    count = math.prod(size)
    first, skip = divmod(offset, 4)
    words = seeded_blocks(seed, first, (skip + count + 3) // 4)
    u = ((words[0::2] >> 8) + 1).double() * 2.0**-24
    theta = (words[1::2] >> 8).double() * 2.0**-24
    radius, angle = torch.sqrt(-2.0 * torch.log(u)), (2.0 * math.pi) * theta
    lanes = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)))  # [cos|sin, pair, block]
    return lanes.permute(2, 1, 0).reshape(-1)[skip : skip + count].to(dtype, copy=True).reshape(size)


@implements("renoise_fwd")
def renoise_fwd(a) -> Tensor:
    """x_t = alpha_b x0 + sigma_b noise, in x0's dtype; ``noise`` None draws it from ``seed``."""
    compute, noise = compute_dtype(a.x0, a.noise), a.noise
    if noise is None:
        noise = seeded_normals(a.x0.shape, a.seed, a.offset, compute)
    return per_sample(a.alpha, a.x0) * a.x0.to(compute) + per_sample(a.sigma, a.x0) * noise.to(compute)


@implements("renoise_bwd")
def renoise_bwd(a) -> Tensor:
    """scale_b * grad in ``dtype``: the gradient of x0 (scale = alpha) or of the noise (scale = sigma)."""
    return per_sample(a.scale, a.grad) * a.grad.to(a.scale.dtype)


@implements("renoise_scale_bwd")
def renoise_scale_bwd(a) -> Tensor:
    """sum_b grad * factor [B]: the gradient of alpha (factor = x0) or of sigma (factor = noise)."""
    compute = compute_dtype(a.grad, a.factor)
    return (a.grad.to(compute) * a.factor.to(compute)).flatten(1).sum(1)
