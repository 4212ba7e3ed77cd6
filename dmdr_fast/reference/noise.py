"""Seeded normals and renoising in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.reference.philox import seeded_blocks
from dmdr_fast.reference.precision import compute_dtype, per_sample


def normal_noise_fwd(size: list[int], seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """N(0, 1) of shape ``size``; see :func:`dmdr_fast.ops.normal_noise` for the stream.

    Box-Muller runs in float64 and is rounded once: the value every backend is compared with.
    """
    count = math.prod(size)
    first, skip = divmod(offset, 4)
    words = seeded_blocks(seed, first, (skip + count + 3) // 4)
    u = ((words[0::2] >> 8) + 1).double() * 2.0**-24
    theta = (words[1::2] >> 8).double() * 2.0**-24
    radius, angle = torch.sqrt(-2.0 * torch.log(u)), (2.0 * math.pi) * theta
    lanes = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)))  # [cos|sin, pair, block]
    return lanes.permute(2, 1, 0).reshape(-1)[skip : skip + count].to(dtype, copy=True).reshape(size)


def renoise_fwd(
    x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int
) -> Tensor:
    """x_t = alpha_b x0 + sigma_b noise, in x0's dtype; ``noise`` None draws it from ``seed``."""
    compute = compute_dtype(x0, noise)
    if noise is None:
        noise = normal_noise_fwd(x0.shape, seed, offset, compute)
    x_t = per_sample(alpha, x0) * x0.to(compute) + per_sample(sigma, x0) * noise.to(compute)
    return x_t.to(x0.dtype).contiguous()


def renoise_bwd(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale_b * grad in ``dtype``: the gradient of x0 (scale = alpha) or of the noise (scale = sigma)."""
    return (per_sample(scale, grad) * grad.to(scale.dtype)).to(dtype).contiguous()


def renoise_scale_bwd(grad: Tensor, factor: Tensor) -> Tensor:
    """sum_b grad * factor [B]: the gradient of alpha (factor = x0) or of sigma (factor = noise)."""
    compute = compute_dtype(grad, factor)
    return (grad.to(compute) * factor.to(compute)).flatten(1).sum(1)
