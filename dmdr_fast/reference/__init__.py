"""Every raw function of the ops in plain PyTorch: the truth in float64, and what runs where no kernel can.

float32, bfloat16 and float16 are computed in float32. All results are new, contiguous tensors.
"""

from dmdr_fast.reference.activation import gated_activation_bwd, gated_activation_fwd
from dmdr_fast.reference.dmd import dmd_gradient_fwd, dmd_loss_bwd
from dmdr_fast.reference.grpo import (
    grpo_loss_bwd,
    grpo_loss_fwd,
    sde_coefficients,
    sde_step_bwd,
    sde_step_fwd,
)
from dmdr_fast.reference.lora import multi_lora_bwd, multi_lora_fwd
from dmdr_fast.reference.modulate import (
    gated_residual_bwd,
    gated_residual_fwd,
    gated_residual_layer_norm_modulate_bwd,
    gated_residual_layer_norm_modulate_fwd,
    layer_norm_modulate_bwd,
    layer_norm_modulate_fwd,
)
from dmdr_fast.reference.noise import normal_noise_fwd, renoise_bwd, renoise_fwd, renoise_scale_bwd
from dmdr_fast.reference.philox import philox4x32, seeded_blocks
from dmdr_fast.reference.preprocess import preprocess_reward_bwd, preprocess_reward_fwd
from dmdr_fast.reference.qk_norm_rope import qk_norm_rope_bwd, qk_norm_rope_fwd

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
    "philox4x32",
    "preprocess_reward_bwd",
    "preprocess_reward_fwd",
    "qk_norm_rope_bwd",
    "qk_norm_rope_fwd",
    "renoise_bwd",
    "renoise_fwd",
    "renoise_scale_bwd",
    "sde_coefficients",
    "sde_step_bwd",
    "sde_step_fwd",
    "seeded_blocks",
]
