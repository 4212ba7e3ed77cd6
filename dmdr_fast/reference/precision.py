"""The arithmetic every reference shares: which dtype it computes in and how per-sample scalars broadcast."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor is float64, else float32."""
    fp64 = any(tensor is not None and tensor.dtype is torch.float64 for tensor in tensors)
    return torch.float64 if fp64 else torch.float32


def per_sample(scalar: Tensor, like: Tensor) -> Tensor:
    """[B] viewed as [B, 1, ...] so that it broadcasts against ``like`` [B, ...]."""
    return scalar.reshape(-1, *[1] * (like.dim() - 1))
