"""Image preparation for a reward model on the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.cuda.library import kernel, workspace_size
from dmdr_fast.backends.views import DTYPE_CODE

_fwd = kernel("preprocess_reward_fwd", "dmdr_preprocess_reward_args")
_bwd = kernel("preprocess_reward_bwd", "dmdr_preprocess_reward_args")
# The kernels want no workspace: 0, or -1 where a block could not hold its tables of weights.
_space = workspace_size("preprocess_reward", 6)
_MOST_CHANNELS = 32


def refusal_fwd(
    image: Tensor,
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    antialias: bool,
    *rest: object,
) -> str | None:
    """Why ``preprocess_reward_fwd`` cannot run, None where it can."""
    return _refusal(image.shape[1], image.shape[2:], (height, width), antialias)


def refusal_bwd(
    grad: Tensor, inside: Tensor, in_width: int, std: list[float], antialias: bool, *rest: object
) -> str | None:
    """Why ``preprocess_reward_bwd`` cannot run, None where it can."""
    return _refusal(grad.shape[1], (inside.shape[2], in_width), grad.shape[2:], antialias)


def preprocess_reward_fwd(
    image: Tensor,
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    antialias: bool,
    low: float,
    high: float,
    need_inside: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.preprocess_reward_fwd`."""
    batch, channels, in_height, in_width = image.shape
    out = image.new_empty((batch, channels, height, width))
    inside = image.new_empty((batch, channels, in_height, (in_width + 7) // 8) if need_inside else 0, dtype=torch.uint8)
    # The library reads these on the host, before the launch.
    statistics = torch.tensor((mean, std), dtype=torch.float64)
    (source, _image), (result, _) = _plane_view(image), _plane_view(out)
    _fwd(
        image.device, batch, channels, in_height, in_width, height, width, *source, *result,
        inside.data_ptr() if need_inside else 0, statistics.data_ptr(), statistics.data_ptr() + 8 * channels,
        low, high, antialias, 0,
    )  # fmt: skip
    return out, inside


def preprocess_reward_bwd(
    grad: Tensor,
    inside: Tensor,
    in_width: int,
    std: list[float],
    antialias: bool,
    low: float,
    high: float,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`dmdr_fast.reference.preprocess_reward_bwd`."""
    batch, channels, in_height, _ = inside.shape
    height, width = grad.shape[2:]
    grad_image = grad.new_empty((batch, channels, in_height, in_width), dtype=dtype)
    inside = inside.contiguous()
    statistics = torch.tensor(std, dtype=torch.float64)
    (result, _), (source, _grad) = _plane_view(grad_image), _plane_view(grad)
    _bwd(
        grad_image.device, batch, channels, in_height, in_width, height, width, *result, *source,
        inside.data_ptr(), 0, statistics.data_ptr(), low, high, antialias, 0,
    )  # fmt: skip
    return grad_image


def _refusal(channels: int, size: tuple[int, int], out: tuple[int, int], antialias: bool) -> str | None:
    if channels > _MOST_CHANNELS:
        return f"it takes up to {_MOST_CHANNELS} channels, the image has {channels}"
    if _space(*size, *out, antialias, 0) < 0:
        return f"the filters from {list(size)} to {list(out)} do not fit into a block's shared memory"
    return None


def _plane_view(image: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The ABI's fields of [N, C, H, W], and the tensor they point into."""
    if image.stride(3) != 1 and image.shape[3] != 1:
        image = image.contiguous()
    return (image.data_ptr(), DTYPE_CODE[image.dtype], *image.stride()[:3], 0, 0), image
