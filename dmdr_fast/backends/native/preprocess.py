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
def preprocess_reward_fwd(run: Calls, a, out) -> None:
    # The library reads these on the host, before the launch.
    numbers = run.kept(torch.tensor((a.mean, a.std), dtype=torch.float64, device="cpu"))
    sizes = *a.image.shape, a.height, a.width
    _call(run, "preprocess_reward_fwd", a, out, sizes, mean=(numbers, 0), std=(numbers, 8 * a.image.shape[1]))


@implements("preprocess_reward_bwd", refuses=_refuses_bwd)
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
