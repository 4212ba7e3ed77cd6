"""Image preparation for a reward model on the kernels of csrc/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, Library, implements
from dmdr_fast.backends.views import strided

_STRUCT = struct_of(
    "dmdr_preprocess_reward_args",
    ("int", "batch channels height width out_height out_width"),
    ("tensor", "image out"),
    ("pointer", "inside mean std"),
    ("double", "low high"),
    ("int", "antialias"),
    ("pointer", "workspace"),
)
_MOST_CUDA_CHANNELS = 32


def _refusal(library: Library, image: tuple[int, ...], out: tuple[int, int], antialias: bool) -> str | None:
    """``image``: [C, H, W]."""
    channels, *size = image
    if library.device_type == "cpu":
        return None
    if channels > _MOST_CUDA_CHANNELS:
        return f"it takes up to {_MOST_CUDA_CHANNELS} channels, the image has {channels}"
    if library.workspace_size("preprocess_reward", *size, *out, antialias, 0) < 0:
        return f"the filters from {size} to {list(out)} do not fit into a block's shared memory"
    return None


@implements(
    "preprocess_reward_fwd",
    refuses=lambda library, a: _refusal(library, a.image.shape[1:], (a.height, a.width), a.antialias),
)
def preprocess_reward_fwd(run: Calls, a, out) -> None:
    # The library reads these on the host, before the launch.
    numbers = run.kept(torch.tensor((a.mean, a.std), dtype=torch.float64, device="cpu"))
    sizes = *a.image.shape, a.height, a.width
    _call(run, "preprocess_reward_fwd", a, out, sizes, mean=(numbers, 0), std=(numbers, 8 * a.image.shape[1]))


@implements(
    "preprocess_reward_bwd",
    refuses=lambda library, a: _refusal(library, (*a.inside.shape[1:3], a.in_width), a.grad.shape[2:], a.antialias),
)
def preprocess_reward_bwd(run: Calls, a, out) -> None:
    std = run.kept(torch.tensor(a.std, dtype=torch.float64, device="cpu"))
    sizes = *out.grad_image.shape, *a.grad.shape[2:]
    _call(run, "preprocess_reward_bwd", a, out, sizes, image=out.grad_image, out=a.grad, std=(std, 0))


def _call(run: Calls, name: str, a, out, sizes: tuple[int, ...], /, **given: Any) -> None:
    """``sizes``: batch, channels, those of the image and those of the result."""
    library, antialias, device = run.library, a.antialias, run.device

    def workspace() -> Tensor:
        # Per thread, and the number of threads may change from call to call; the CUDA kernels want none.
        size = library.workspace_size("preprocess_reward", *sizes[2:], antialias, torch.get_num_threads())
        return torch.empty(size, dtype=torch.int64, device=device)

    names = ("batch", "channels", "height", "width", "out_height", "out_width")
    given |= {**dict(zip(names, sizes, strict=True)), "workspace": run.allocate(workspace)}
    run.call(name, _STRUCT, run.fields(_STRUCT, a, out, strided, **given))
