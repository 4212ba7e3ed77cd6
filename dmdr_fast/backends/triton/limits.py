"""What the Triton kernels cannot run, and why."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
    raise ImportError(f"triton 3.4 or newer is needed, this is {triton.__version__}")

# A block holds a row: beyond this its registers spill more than they hold.
_LONGEST_ROW = 65536
_LONGEST_HEAD = 4096
# 65535 blocks of 2048 elements are the most that the second dimension of a grid takes.
_LARGEST_SAMPLE = 65535 * 2048
_MOST_CHANNELS = 64

# Which argument has the shape that a limit is about.
_ROWS = {
    "layer_norm_modulate_fwd": 0,
    "layer_norm_modulate_bwd": 1,
    "gated_residual_layer_norm_modulate_fwd": 0,
    "gated_residual_layer_norm_modulate_bwd": 2,
}
_SAMPLES = {
    "renoise_fwd": 0,
    "renoise_bwd": 0,
    "renoise_scale_bwd": 0,
    "dmd_gradient_fwd": 0,
    "dmd_loss_bwd": 1,
    "sde_step_fwd": 0,
    "sde_step_bwd": 3,
}
_HEADS = {"qk_norm_rope_fwd": 0, "qk_norm_rope_bwd": 2}
_IMAGES = {"preprocess_reward_fwd": 0, "preprocess_reward_bwd": 0}


def supports(name: str, *args: object) -> str | None:
    """None, or why ``name`` cannot run these checked arguments."""
    device = next(arg for arg in args if isinstance(arg, Tensor)).device
    if device.type == "cuda" and _capability(device.index) < (8, 0):
        return f"the GPU's compute capability is {'.'.join(map(str, _capability(device.index)))}, below 8.0"
    if name in _ROWS and (width := args[_ROWS[name]].shape[-1]) > _LONGEST_ROW:
        return f"it takes rows of at most {_LONGEST_ROW} features, these have {width}"
    if name in _HEADS and (width := args[_HEADS[name]].shape[-1]) > _LONGEST_HEAD:
        return f"it takes heads of at most {_LONGEST_HEAD} features, these have {width}"
    if name in _SAMPLES and (count := args[_SAMPLES[name]].shape[1:].numel()) > _LARGEST_SAMPLE:
        return f"it takes samples of at most {_LARGEST_SAMPLE} elements, these have {count}"
    if name in _IMAGES and (channels := args[_IMAGES[name]].shape[1]) > _MOST_CHANNELS:
        return f"it takes images of at most {_MOST_CHANNELS} channels, these have {channels}"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
