"""Image preparation for a reward model on the kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.native.library import Calls, Library, implements
from dmdr_fast.backends.views import Strided

_MOST_CUDA_CHANNELS = 32


def _refusal(
    library: Library, channels: int, size: tuple[int, int], out: tuple[int, int], antialias: bool
) -> str | None:
    if library.device_type == "cpu":
        return None
    if channels > _MOST_CUDA_CHANNELS:
        return f"it takes up to {_MOST_CUDA_CHANNELS} channels, the image has {channels}"
    if library.workspace_size("preprocess_reward", *size, *out, antialias, 0) < 0:
        return f"the filters from {list(size)} to {list(out)} do not fit into a block's shared memory"
    return None


def _refuses_fwd(library: Library, a) -> str | None:
    return _refusal(library, a.image.shape[1], a.image.shape[2:], (a.height, a.width), a.antialias)


def _refuses_bwd(library: Library, a) -> str | None:
    return _refusal(library, a.grad.shape[1], (a.inside.shape[2], a.in_width), a.grad.shape[2:], a.antialias)


@implements("preprocess_reward_fwd", refuses=_refuses_fwd)
def preprocess_reward_fwd(run: Calls, a) -> tuple[Tensor, Tensor]:
    batch, channels, in_height, in_width = a.image.shape
    out = run.new((batch, channels, a.height, a.width), a.image.dtype)
    inside = run.new((batch, channels, in_height, (in_width + 7) // 8) if a.need_inside else (0,), torch.uint8)
    # The library reads these on the host, before the launch.
    statistics = run.kept(torch.tensor((a.mean, a.std), dtype=torch.float64, device="cpu"))
    run.call(
        "preprocess_reward_fwd", "dmdr_preprocess_reward_args", batch=batch, channels=channels, height=in_height,
        width=in_width, out_height=a.height, out_width=a.width, image=_planes(a.image), out=_planes(out),
        inside=inside if a.need_inside else None, mean=statistics, std=(statistics, 8 * channels), low=a.low,
        high=a.high, antialias=a.antialias, workspace=_space(run, in_height, in_width, a.height, a.width, a.antialias),
    )  # fmt: skip
    return out, inside


@implements("preprocess_reward_bwd", refuses=_refuses_bwd)
def preprocess_reward_bwd(run: Calls, a) -> Tensor:
    batch, channels, in_height, _ = a.inside.shape
    height, width = a.grad.shape[2:]
    grad_image = run.new((batch, channels, in_height, a.in_width), a.dtype)
    std = run.kept(torch.tensor(a.std, dtype=torch.float64, device="cpu"))
    run.call(
        "preprocess_reward_bwd", "dmdr_preprocess_reward_args", batch=batch, channels=channels, height=in_height,
        width=a.in_width, out_height=height, out_width=width, image=_planes(grad_image), out=_planes(a.grad),
        inside=a.inside.contiguous(), std=std, low=a.low, high=a.high,
        antialias=a.antialias, workspace=_space(run, in_height, a.in_width, height, width, a.antialias),
    )  # fmt: skip
    return grad_image


def _space(run: Calls, *sizes: int) -> Tensor:
    """Per thread, and the number of threads may change from call to call; the CUDA kernels want none."""

    def allocate(device: torch.device) -> Tensor:
        size = run.library.workspace_size("preprocess_reward", *sizes, torch.get_num_threads())
        return torch.empty(size, dtype=torch.int64, device=device)

    return run.allocate(allocate)


def _planes(image: Tensor) -> Strided:
    """[N, C, H, W]; copied only if the last dimension is not contiguous."""
    if image.stride(3) != 1 and image.shape[3] != 1:
        image = image.contiguous()
    return Strided(image, image.stride()[:3])
