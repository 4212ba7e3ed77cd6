"""From decoded images to a reward model's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, written
from dmdr_fast.reference import Result, compute_dtype


def preprocess_reward(
    image: Tensor,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    antialias: bool = True,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """(resize((clamp(image, low, high) - low) / (high - low)) - mean) / std, with bicubic resizing.

    The resize is that of ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``: a = -0.5
    with ``antialias``, -0.75 without. It may overshoot [0, 1] a little at edges; nothing is clamped after it.

    Args:
        image: [N, C, H, W] of any float dtype, e.g. what the VAE decodes.
        size: (height, width), or one int for both.
        mean, std: one number per channel (or a single one), in units of [0, 1]; std > 0.
        antialias: widen the filter by the scale when shrinking.
        value_range: (low, high) of the image's values, low < high.

    Returns:
        [N, C, height, width], contiguous, in the image's dtype; computed in float32 (float64 for float64).

    Differentiable in image: the gradient passes where low <= image <= high, both ends included. For the
    backward one bit per pixel is kept, not the image. No atomics: two runs give the same bits.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: ReFL (arXiv 2304.05977) and DMDR: x0 -> VAE decode -> clamp -> resize, normalise -> reward.
    """
    op = "preprocess_reward"
    check.floating(op, "image", image)
    if image.dim() != 4 or 0 in image.shape[1:]:
        raise ValueError(f"{op}: image: expected [N, C, H, W] with C, H, W >= 1, got shape {list(image.shape)}")
    height, width = _size(op, size)
    mean, std = (_per_channel(op, name, values, image) for name, values in (("mean", mean), ("std", std)))
    if not isinstance(value_range, (tuple, list)) or len(value_range) != 2:
        raise ValueError(f"{op}: value_range: expected (low, high), got {value_range!r}")
    low, high = (float(check.number(op, "value_range", value)) for value in value_range)
    need_inside = image.requires_grad and torch.is_grad_enabled()
    return _fwd.checked(op, image, height, width, mean, std, bool(antialias), low, high, need_inside)[0]


def _check(op: str, a) -> None:
    for value in a.std:
        check.number(op, "std", value, above=0)
    if a.low >= a.high:
        raise ValueError(f"{op}: value_range: expected low < high, got {(a.low, a.high)!r}")


def _size(op: str, size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, (int, torch.SymInt)) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{op}: size: expected an int or (height, width), got {size!r}")
    for value in pair:
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 1:
            raise ValueError(f"{op}: size: expected positive ints, got {size!r}")
    return pair[0], pair[1]


def _per_channel(op: str, name: str, values: Sequence[float], image: Tensor) -> list[float]:
    """One float for each channel."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{op}: {name}: expected a sequence of floats, got {type(values).__name__}")
    channels = image.shape[1]
    if len(values) != 1 and len(values) != channels:
        raise ValueError(f"{op}: {name}: expected {channels} values, one per channel, got {len(values)}")
    numbers = [float(check.number(op, name, value)) for value in values]
    return numbers * channels if len(numbers) != channels else numbers


def _save(ctx, a, results) -> None:
    ctx.save_for_backward(results[1])
    ctx.options = a.image.shape[-1], a.std, a.antialias, a.low, a.high, a.image.dtype


def _backward(ctx, needed, grad, _) -> dict:
    return {"image": _bwd(grad, *ctx.saved_tensors, *ctx.options)}


def _results(a):
    batch, channels, rows, columns = a.image.shape
    bits = (batch, channels, rows, (columns + 7) // 8) if a.need_inside else None
    return Result((batch, channels, a.height, a.width), a.image.dtype), Result(bits, torch.uint8)


def _formula(
    image: Tensor, height: int, width: int, mean: list[float], std: list[float], antialias: bool,
    low: float, high: float, need_inside: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``inside`` is uint8 [N, C, H, ceil(W / 8)]: bit j of byte k is low <= image[..., 8 k + j] <= high. It
    takes 1/16 of a bfloat16 image, which need not be kept for the backward.
    """
    pixels = image.to(compute_dtype(image))
    unit = (pixels.clamp(low, high) - low) / (high - low)
    resized = _resize(unit, (height, width), antialias)
    out = (resized - _channels(mean, resized)) / _channels(std, resized)
    return out, _pack((pixels >= low) & (pixels <= high)) if need_inside else None


def _formula_bwd(
    grad: Tensor, inside: Tensor, in_width: int, std: list[float], antialias: bool, low: float, high: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """V^T grad H of the two resizing matrices, where the clamp passes it.

    Matrix products, not PyTorch's own backward: that one adds with atomics on a GPU.
    """
    grad = grad.to(compute_dtype(grad))
    grad = grad / _channels(std, grad)
    vertical = _weights(inside.shape[-2], grad.shape[-2], antialias, grad)
    horizontal = _weights(in_width, grad.shape[-1], antialias, grad)
    pixels = vertical.mT @ grad @ horizontal / (high - low)
    return torch.where(_unpack(inside, in_width), pixels, 0)


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


_bwd = Raw(
    "preprocess_reward_bwd", "grad_image", lambda a: Result((*a.inside.shape[:-1], a.in_width), a.dtype), _formula_bwd
)
_fwd = Raw(
    "preprocess_reward_fwd", "out inside", _results, _formula,
    check=_check, backward=written(_save, _backward), constants=(1,),
)  # fmt: skip
