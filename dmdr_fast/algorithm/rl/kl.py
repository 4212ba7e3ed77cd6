"""The KL to a reference on the leaf x0: what holds the generator where there is no policy to take a ratio of."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def kl_leaf_gradient(x0: Tensor, x0_ref: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """weight * d(value)/d(x0) on the leaf x0 [B, ...] in x0's dtype, and value = 1/2 mean (x0 - x0_ref)^2 (0-d).

    The mean is over all elements; x0_ref (x0's shape) is the reference's sample from the same input, a constant. The
    value, without the weight, is the KL per element of two Gaussians of unit variance around the samples. Computed in
    fp32 or fp64.

    Source: the KL regulariser that DMDR (arXiv 2511.13649) compares DMD with, for a deterministic generator.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    difference = x0.to(dtype) - x0_ref.to(dtype)
    return (weight / x0.numel() * difference).to(x0.dtype), 0.5 * difference.square().mean()
