"""The C++ kernels of libdmdr_cpu behind the raw functions' names: the default for CPU tensors."""

from dmdr_fast.backends.cpu.activation import gated_activation_bwd, gated_activation_fwd
from dmdr_fast.backends.cpu.dmd import dmd_gradient_fwd, dmd_loss_bwd
from dmdr_fast.backends.cpu.lora import multi_lora_bwd, multi_lora_fwd
from dmdr_fast.backends.cpu.noise import (
    normal_noise_fwd,
    renoise_bwd,
    renoise_fwd,
    renoise_scale_bwd,
)
from dmdr_fast.backends.cpu.norm import (
    gated_residual_bwd,
    gated_residual_fwd,
    gated_residual_layer_norm_modulate_bwd,
    gated_residual_layer_norm_modulate_fwd,
    layer_norm_modulate_bwd,
    layer_norm_modulate_fwd,
)
from dmdr_fast.backends.cpu.policy import (
    grpo_loss_bwd,
    grpo_loss_fwd,
    sde_step_bwd,
    sde_step_fwd,
)
from dmdr_fast.backends.cpu.preprocess import preprocess_reward_bwd, preprocess_reward_fwd
from dmdr_fast.backends.cpu.rope import MOST_FEATURES, qk_norm_rope_bwd, qk_norm_rope_fwd

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


def supports(name: str, *args: object) -> str | None:
    """None where the kernels take this call on CPU tensors of float32, bfloat16 and float16; else why not."""
    if name == "qk_norm_rope_bwd" and args[2].shape[3] > MOST_FEATURES:
        return f"its backward takes heads of at most {MOST_FEATURES} features, got {args[2].shape[3]}"
    if name.startswith("multi_lora"):
        in_features, rank = args[2 if name.endswith("fwd") else 3].shape
        if in_features == 0 or rank == 0:
            return f"it has nothing to multiply: A is [{in_features}, {rank}]"
    return None
