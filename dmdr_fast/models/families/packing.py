"""Latents as tokens: 2 x 2 patches, and the positions of a grid."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latent: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 W/2, 4 C], a token the 2 x 2 pixels of every channel (FLUX.1, Qwen-Image)."""
    batch, channels, height, width = latent.shape
    patches = latent.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``: [B, H/2 W/2, 4 C] -> [B, C, height, width] latent pixels."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def unpatchify(latent: Tensor) -> Tensor:
    """[B, 4 C, H, W] -> [B, C, 2 H, 2 W], channels ordered (C, row, column) (FLUX.2)."""
    batch, channels, height, width = latent.shape
    patches = latent.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return patches.reshape(batch, channels // 4, 2 * height, 2 * width)


def grid_ids(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """fp32 [height width, axes]: row on axis 1, column on axis 2, zeros elsewhere."""
    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 1] += torch.arange(height, device=device)[:, None]
    ids[..., 2] += torch.arange(width, device=device)[None, :]
    return ids.reshape(height * width, axes)
