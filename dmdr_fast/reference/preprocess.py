"""Image preparation for a reward model in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast.reference.precision import compute_dtype
from dmdr_fast.reference.registry import implements


@implements("preprocess_reward_fwd")
def preprocess_reward_fwd(a) -> tuple[Tensor, Tensor | None]:
    """(prepared image in the image's dtype, bits of where the clamp passes a gradient).

    ``inside`` is uint8 [N, C, H, ceil(W / 8)]: bit j of byte k is low <= image[..., 8 k + j] <= high. It
    takes 1/16 of a bfloat16 image, which need not be kept for the backward.
    """
    pixels = a.image.to(compute_dtype(a.image))
    unit = (pixels.clamp(a.low, a.high) - a.low) / (a.high - a.low)
    resized = _resize(unit, (a.height, a.width), a.antialias)
    out = (resized - _channels(a.mean, resized)) / _channels(a.std, resized)
    return out, _pack((pixels >= a.low) & (pixels <= a.high)) if a.need_inside else None


@implements("preprocess_reward_bwd")
def preprocess_reward_bwd(a) -> Tensor:
    """The gradient of the image [N, C, H, W]: V^T grad H of the two resizing matrices, where the clamp passes it.

    Matrix products, not PyTorch's own backward: that one adds with atomics on a GPU.
    """
    grad = a.grad.to(compute_dtype(a.grad))
    grad = grad / _channels(a.std, grad)
    vertical = _weights(a.inside.shape[-2], grad.shape[-2], a.antialias, grad)
    horizontal = _weights(a.in_width, grad.shape[-1], a.antialias, grad)
    pixels = vertical.mT @ grad @ horizontal / (a.high - a.low)
    return torch.where(_unpack(a.inside, a.in_width), pixels, 0)


def _resize(image: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    if image.shape[0] == 0:  # F.interpolate refuses an empty batch
        return image.new_empty(*image.shape[:2], *size)
    return F.interpolate(image, size=size, mode="bicubic", antialias=antialias, align_corners=False)


def _weights(size_in: int, size_out: int, antialias: bool, like: Tensor) -> Tensor:
    """The matrix [size_out, size_in] that resizes one dimension: what PyTorch makes of the unit vectors."""
    return _resize(
        torch.eye(size_in, dtype=like.dtype, device=like.device)[None, None], (size_out, size_in), antialias
    )[0, 0]


def _channels(values: list[float], like: Tensor) -> Tensor:
    """[C, 1, 1], filled on the device: a copy of the list from the host would wait for it."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


def _pack(flags: Tensor) -> Tensor:
    """Booleans [..., W] as bytes [..., ceil(W / 8)], the first in the lowest bit."""
    padded = F.pad(flags, (0, -flags.shape[-1] % 8))
    bits = padded.reshape(*flags.shape[:-1], padded.shape[-1] // 8, 8).to(torch.uint8) << _bit_numbers(flags)
    return bits.sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, width: int) -> Tensor:
    bits = (packed.unsqueeze(-1) >> _bit_numbers(packed)) & 1
    return bits.flatten(-2)[..., :width].bool()


def _bit_numbers(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
