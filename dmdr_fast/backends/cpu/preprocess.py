"""Image preparation for a reward model on the CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.cpu.library import CPU, kernel, new_output, pointer, workspace
from dmdr_fast.backends.views import DTYPE_CODE

_space = workspace("preprocess_reward", 6, torch.int64)
_fwd = kernel("preprocess_reward_fwd", "dmdr_preprocess_reward_args")
_bwd = kernel("preprocess_reward_bwd", "dmdr_preprocess_reward_args")


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
    out = new_output((batch, channels, height, width), image.dtype)
    inside = torch.empty(
        (batch, channels, in_height, (in_width + 7) // 8) if need_inside else 0, dtype=torch.uint8, device=CPU
    )
    statistics = torch.tensor((mean, std), dtype=torch.float64, device=CPU)
    space = _space(in_height, in_width, height, width, antialias, torch.get_num_threads())
    (source, _image), (result, _) = _plane_view(image), _plane_view(out)
    _fwd(
        batch, channels, in_height, in_width, height, width, *source, *result,
        pointer(inside) if need_inside else 0, statistics.data_ptr(), statistics.data_ptr() + 8 * channels,
        low, high, antialias, space.data_ptr(),
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
    grad_image = new_output((batch, channels, in_height, in_width), dtype)
    inside = inside.contiguous()
    statistics = torch.tensor(std, dtype=torch.float64, device=CPU)
    space = _space(in_height, in_width, height, width, antialias, torch.get_num_threads())
    (result, _), (source, _grad) = _plane_view(grad_image), _plane_view(grad)
    _bwd(
        batch, channels, in_height, in_width, height, width, *result, *source,
        inside.data_ptr(), 0, statistics.data_ptr(), low, high, antialias, space.data_ptr(),
    )  # fmt: skip
    return grad_image


def _plane_view(image: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The ABI's fields of [N, C, H, W], and the tensor they point into."""
    if image.stride(3) != 1 and image.shape[3] != 1:
        image = image.contiguous()
    return (image.data_ptr(), DTYPE_CODE[image.dtype], *image.stride()[:3], 0, 0), image
