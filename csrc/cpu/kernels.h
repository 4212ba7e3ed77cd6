// The kernels of one instruction-set level, behind a table that dispatch.cpp picks at load.
#pragma once

#include "dmdr/abi.h"

// Every entry point: X(function, argument struct).
#define DMDR_FOR_EACH_KERNEL(X)                             \
  X(renoise_fwd, dmdr_renoise_args)                         \
  X(renoise_bwd, dmdr_renoise_args)                         \
  X(renoise_scale_bwd, dmdr_renoise_args)                   \
  X(dmd_gradient_fwd, dmdr_dmd_gradient_args)               \
  X(dmd_gradient_bwd, dmdr_dmd_gradient_args)               \
  X(multi_lora_fwd, dmdr_multi_lora_args)                   \
  X(multi_lora_bwd, dmdr_multi_lora_args)                   \
  X(layer_norm_modulate_fwd, dmdr_layer_norm_modulate_args) \
  X(layer_norm_modulate_bwd, dmdr_layer_norm_modulate_args) \
  X(gated_residual_fwd, dmdr_gated_residual_args)           \
  X(gated_residual_bwd, dmdr_gated_residual_args)           \
  X(rms_norm_scale_fwd, dmdr_rms_norm_scale_args)           \
  X(rms_norm_scale_bwd, dmdr_rms_norm_scale_args)           \
  X(gated_activation_fwd, dmdr_gated_activation_args)       \
  X(gated_activation_bwd, dmdr_gated_activation_args)       \
  X(qk_norm_rope_fwd, dmdr_qk_norm_rope_args)               \
  X(qk_norm_rope_bwd, dmdr_qk_norm_rope_args)               \
  X(sde_step_fwd, dmdr_sde_step_args)                       \
  X(sde_step_bwd, dmdr_sde_step_args)                       \
  X(preprocess_reward_fwd, dmdr_preprocess_reward_args)     \
  X(preprocess_reward_bwd, dmdr_preprocess_reward_args)

#define DMDR_DECLARE_KERNEL(name, Args) void name(const Args &args);
#define DMDR_DECLARE_LEVEL(level) \
  namespace level {               \
  DMDR_FOR_EACH_KERNEL(DMDR_DECLARE_KERNEL) \
  }

namespace dmdr {
DMDR_DECLARE_LEVEL(baseline)
#if defined(__x86_64__)
DMDR_DECLARE_LEVEL(v3)
DMDR_DECLARE_LEVEL(v4)
DMDR_DECLARE_LEVEL(v4_bf16)  // multi_lora only
#endif
}  // namespace dmdr
