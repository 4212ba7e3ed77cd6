"""Images as CLIP and its descendants take them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast import ops

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def square_pixels(images: Tensor, size: int, *, fit: Literal["crop", "pad"] = "crop") -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] (clamped) to [B, 3, size, size], normalised by CLIP's statistics.

    Resized by antialiased bicubic interpolation and, unlike an image processor's, never rounded to 8 bits, so that
    the gradient passes. ``crop``: the shorter edge becomes ``size`` and the centre stays, as CLIP, PickScore,
    ImageReward and the aesthetic predictor have it; ``pad``: the longer edge does and black fills up, as HPSv2 has it.

    Raises:
        ValueError: images of another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
    height, width = images.shape[2:]
    if fit == "crop":
        scale = size / min(height, width)
        resized = (max(size, int(height * scale)), max(size, int(width * scale)))
        pixels = ops.preprocess_reward(images, resized, CLIP_MEAN, CLIP_STD)
        top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
        return pixels[:, :, top : top + size, left : left + size]
    scale = size / max(height, width)
    resized = (round(height * scale), round(width * scale))
    pixels = ops.preprocess_reward(images, resized, CLIP_MEAN, CLIP_STD)
    if resized == (size, size):
        return pixels
    top, left = (size - resized[0]) // 2, (size - resized[1]) // 2
    margins = (left, size - resized[1] - left, top, size - resized[0] - top)
    channels = [
        F.pad(pixels[:, c], margins, value=-mean / std)
        for c, (mean, std) in enumerate(zip(CLIP_MEAN, CLIP_STD, strict=True))
    ]
    return torch.stack(channels, dim=1)
