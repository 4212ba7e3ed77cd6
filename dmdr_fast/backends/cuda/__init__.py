"""The CUDA kernels of libdmdr_cuda behind the raw functions' names."""

from __future__ import annotations

import torch

from dmdr_fast.backends.cuda import norm, preprocess
from dmdr_fast.backends.cuda.dmd import dmd_gradient_fwd, dmd_loss_bwd
from dmdr_fast.backends.cuda.library import too_old
from dmdr_fast.backends.cuda.noise import normal_noise_fwd, renoise_bwd, renoise_fwd, renoise_scale_bwd
from dmdr_fast.backends.cuda.norm import layer_norm_modulate_bwd, layer_norm_modulate_fwd
from dmdr_fast.backends.cuda.preprocess import preprocess_reward_bwd, preprocess_reward_fwd

__all__ = [
    "dmd_gradient_fwd",
    "dmd_loss_bwd",
    "layer_norm_modulate_bwd",
    "layer_norm_modulate_fwd",
    "normal_noise_fwd",
    "preprocess_reward_bwd",
    "preprocess_reward_fwd",
    "renoise_bwd",
    "renoise_fwd",
    "renoise_scale_bwd",
    "supports",
]

_REFUSALS = {
    "layer_norm_modulate_fwd": norm.refusal_fwd,
    "layer_norm_modulate_bwd": norm.refusal_bwd,
    "preprocess_reward_fwd": preprocess.refusal_fwd,
    "preprocess_reward_bwd": preprocess.refusal_bwd,
}


def supports(name: str, *args: object) -> str | None:
    """Why the kernels cannot take a checked call on CUDA tensors, None where they can."""
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    why = too_old(device)
    if why is None and name in _REFUSALS:
        why = _REFUSALS[name](*args)
    return why
