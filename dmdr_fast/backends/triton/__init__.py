"""The Triton kernels of kernels/ behind the raw functions' names: the default for CUDA tensors.

Launch configurations are rules on the shape, not measurements: nothing is timed on a user's inputs, the first call runs
like any other, and all of it can be captured in a CUDA graph. Arithmetic is float32, sums have a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from dmdr_fast import reference
from dmdr_fast.backends.triton import activation, dmd, grpo, lora, norm, preprocess, qk, renoise, sde
from dmdr_fast.backends.triton.limits import supports


def _raw(function: Callable) -> Callable:
    """``function`` on its tensors' device; on empty tensors the reference, there is nothing to launch."""
    on_nothing = getattr(reference, function.__name__)

    @functools.wraps(function)
    def run(*args):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(tensor.numel() == 0 for tensor in tensors):
            return on_nothing(*args)
        device = tensors[0].device
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            return function(*args)

    return run


dmd_gradient_fwd = _raw(dmd.dmd_gradient_fwd)
dmd_loss_bwd = _raw(dmd.dmd_loss_bwd)
gated_activation_bwd = _raw(activation.gated_activation_bwd)
gated_activation_fwd = _raw(activation.gated_activation_fwd)
gated_residual_bwd = _raw(norm.gated_residual_bwd)
gated_residual_fwd = _raw(norm.gated_residual_fwd)
gated_residual_layer_norm_modulate_bwd = _raw(norm.gated_residual_layer_norm_modulate_bwd)
gated_residual_layer_norm_modulate_fwd = _raw(norm.gated_residual_layer_norm_modulate_fwd)
grpo_loss_bwd = _raw(grpo.grpo_loss_bwd)
grpo_loss_fwd = _raw(grpo.grpo_loss_fwd)
layer_norm_modulate_bwd = _raw(norm.layer_norm_modulate_bwd)
layer_norm_modulate_fwd = _raw(norm.layer_norm_modulate_fwd)
multi_lora_bwd = _raw(lora.multi_lora_bwd)
multi_lora_fwd = _raw(lora.multi_lora_fwd)
normal_noise_fwd = _raw(renoise.normal_noise_fwd)
preprocess_reward_bwd = _raw(preprocess.preprocess_reward_bwd)
preprocess_reward_fwd = _raw(preprocess.preprocess_reward_fwd)
qk_norm_rope_bwd = _raw(qk.qk_norm_rope_bwd)
qk_norm_rope_fwd = _raw(qk.qk_norm_rope_fwd)
renoise_bwd = _raw(renoise.renoise_bwd)
renoise_fwd = _raw(renoise.renoise_fwd)
renoise_scale_bwd = _raw(renoise.renoise_scale_bwd)
sde_step_bwd = _raw(sde.sde_step_bwd)
sde_step_fwd = _raw(sde.sde_step_fwd)

__all__ = [
    "dmd_gradient_fwd",
    "dmd_loss_bwd",
    "gated_activation_bwd",
    "gated_activation_fwd",
    "gated_residual_bwd",
    "gated_residual_fwd",
    "gated_residual_layer_norm_modulate_bwd",
    "gated_residual_layer_norm_modulate_fwd",
    "grpo_loss_bwd",
    "grpo_loss_fwd",
    "layer_norm_modulate_bwd",
    "layer_norm_modulate_fwd",
    "multi_lora_bwd",
    "multi_lora_fwd",
    "normal_noise_fwd",
    "preprocess_reward_bwd",
    "preprocess_reward_fwd",
    "qk_norm_rope_bwd",
    "qk_norm_rope_fwd",
    "renoise_bwd",
    "renoise_fwd",
    "renoise_scale_bwd",
    "sde_step_bwd",
    "sde_step_fwd",
    "supports",
]
