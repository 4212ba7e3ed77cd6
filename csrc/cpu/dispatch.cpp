// The exported functions: check the argument struct, then call the kernel of the best level this CPU runs.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace {

struct Level {
  const char *name;
#define DMDR_KERNEL_POINTER(function, Args) void (*function)(const Args &);
  DMDR_FOR_EACH_KERNEL(DMDR_KERNEL_POINTER)
};

#define DMDR_KERNEL_ADDRESS_baseline(function, Args) dmdr::baseline::function,
#define DMDR_KERNEL_ADDRESS_v3(function, Args) dmdr::v3::function,
#define DMDR_KERNEL_ADDRESS_v4(function, Args) dmdr::v4::function,
const Level kBaseline = {"baseline", DMDR_FOR_EACH_KERNEL(DMDR_KERNEL_ADDRESS_baseline)};
#if defined(__x86_64__)
const Level kV3 = {"v3", DMDR_FOR_EACH_KERNEL(DMDR_KERNEL_ADDRESS_v3)};
const Level kV4 = {"v4", DMDR_FOR_EACH_KERNEL(DMDR_KERNEL_ADDRESS_v4)};

Level with_bf16_products(Level level) {
  level.name = "v4_bf16";
  level.multi_lora_fwd = dmdr::v4_bf16::multi_lora_fwd;
  level.multi_lora_bwd = dmdr::v4_bf16::multi_lora_bwd;
  return level;
}
const Level kV4Bf16 = with_bf16_products(kV4);
#endif

// DMDR_CPU_LEVEL=baseline|v3|v4|v4_bf16 lowers the level (to reproduce an older machine's bits); read once, at load.
const Level &best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const char *limit = std::getenv("DMDR_CPU_LEVEL");
  const auto allows = [limit](const char *name) { return limit == nullptr || std::strcmp(limit, name) >= 0; };
  // "baseline" < "v3" < "v4" < "v4_bf16", also as strings. The features are those that x86-64-v3 and -v4
  // add and that compilers name.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && __builtin_cpu_supports("avx512bf16") && allows("v4_bf16")) return kV4Bf16;
  if (v4 && allows("v4")) return kV4;
  if (v3 && allows("v3")) return kV3;
#endif
  return kBaseline;
}
const Level &kLevel = best_level();

// ---- what a kernel may rely on -------------------------------------------------------------------------------------
bool has_bad_size(const int64_t *shape) {
  for (int dim = 0; dim <= DMDR_OUTER; ++dim)
    if (shape[dim] < 0) return true;
  return false;
}

bool has_bad_dtype(std::initializer_list<dmdr_tensor> tensors) {
  for (const dmdr_tensor &tensor : tensors)
    if (tensor.data != nullptr && (tensor.dtype < DMDR_F32 || tensor.dtype > DMDR_F16)) return true;
  return false;
}

bool outside(int64_t value, int64_t last) { return value < 0 || value > last; }

dmdr_status check(const dmdr_renoise_args &args) {
  if (has_bad_dtype({args.x0, args.noise, args.out})) return DMDR_ERROR_DTYPE;
  return has_bad_size(args.shape) || args.offset < 0 ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

dmdr_status check(const dmdr_dmd_gradient_args &args) {
  if (has_bad_dtype({args.x0, args.x_t, args.pred_fake, args.pred_real, args.pred_real_uncond, args.grad}))
    return DMDR_ERROR_DTYPE;
  const bool bad_mode = outside(args.cfg_mode, DMDR_CFG_OFFSET) || outside(args.prediction, DMDR_X0) ||
                        outside(args.normalizer, DMDR_NO_NORMALIZER) || outside(args.eps_mode, DMDR_EPS_NONE) ||
                        outside(args.nan_policy, DMDR_NAN_KEEP);
  return bad_mode || has_bad_size(args.shape) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

dmdr_status check(const dmdr_multi_lora_args &args) {
  if (has_bad_dtype({args.x, args.base, args.out, args.A, args.B, args.grad, args.grad_x})) return DMDR_ERROR_DTYPE;
  const bool bad = args.batch < 0 || args.rows < 0 || args.in_features <= 0 || args.rank <= 0 || args.out_features < 0;
  return bad ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

dmdr_status check(const dmdr_layer_norm_modulate_args &args) {
  if (has_bad_dtype({args.x, args.shift, args.scale, args.y, args.grad_y, args.grad_x, args.grad_shift,
                     args.grad_scale}))
    return DMDR_ERROR_DTYPE;
  return has_bad_size(args.shape) || outside(args.gather, DMDR_GATHER_ALL) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

dmdr_status check(const dmdr_gated_residual_args &args) {
  if (has_bad_dtype({args.x, args.h, args.gate, args.shift, args.scale, args.residual, args.y, args.grad_residual,
                     args.grad_y, args.grad_x, args.grad_h, args.grad_gate, args.grad_shift, args.grad_scale}))
    return DMDR_ERROR_DTYPE;
  const bool bad = outside(args.gather, DMDR_GATHER_ALL) || outside(args.gather_gate, DMDR_GATHER_ALL);
  return bad || has_bad_size(args.shape) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

dmdr_status check(const dmdr_rms_norm_scale_args &args) {
  if (has_bad_dtype({args.x, args.weight, args.scale, args.residual, args.y, args.grad_y, args.grad_x,
                     args.grad_weight, args.grad_scale}))
    return DMDR_ERROR_DTYPE;
  const bool bad = outside(args.gather_weight, DMDR_GATHER_ALL) || outside(args.gather, DMDR_GATHER_ALL);
  return bad || has_bad_size(args.shape) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

dmdr_status check(const dmdr_gated_activation_args &args) {
  if (has_bad_dtype({args.value, args.gate, args.out, args.grad, args.grad_value, args.grad_gate}))
    return DMDR_ERROR_DTYPE;
  return has_bad_size(args.shape) || outside(args.activation, DMDR_SILU) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

dmdr_status check(const dmdr_qk_norm_rope_args &args) {
  if (has_bad_dtype({args.cos, args.sin})) return DMDR_ERROR_DTYPE;
  bool bad = args.batch < 0 || args.rows < 0 || args.features <= 0;
  for (const dmdr_qk_side *side : {&args.q, &args.k}) {
    if (has_bad_dtype({side->x, side->weight, side->out, side->grad, side->grad_x})) return DMDR_ERROR_DTYPE;
    bad = bad || side->heads < 0 || (side->grad.data != nullptr && args.features > DMDR_ROPE_FEATURES);
  }
  return bad || (args.cos.data != nullptr && args.features % 2 != 0) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

dmdr_status check(const dmdr_sde_step_args &args) {
  if (has_bad_dtype({args.x, args.v, args.next_sample, args.mean, args.grad_next, args.grad_mean, args.grad_x,
                     args.grad_v}))
    return DMDR_ERROR_DTYPE;
  const bool bad = has_bad_size(args.shape) || args.offset < 0 || outside(args.kind, DMDR_SDE_CPS);
  return bad ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}


dmdr_status check(const dmdr_preprocess_reward_args &args) {
  if (has_bad_dtype({args.image, args.out})) return DMDR_ERROR_DTYPE;
  const bool bad = args.batch < 0 || args.channels < 0 || args.height < 0 || args.width < 0 || args.out_height <= 0 ||
                   args.out_width <= 0 || args.num_threads < 1;
  return bad ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace

extern "C" {

int64_t dmdr_abi_version(void) { return DMDR_ABI_VERSION; }

const char *dmdr_cpu_level(void) { return kLevel.name; }

const char *dmdr_error_string(int status) {
  switch (status) {
    case DMDR_OK: return "no error";
    case DMDR_ERROR_STRUCT_SIZE: return "the argument struct has another size than this library's";
    case DMDR_ERROR_DTYPE: return "a tensor's dtype is none of float32, bfloat16 and float16";
    case DMDR_ERROR_ARGUMENT: return "a size, mode or pointer is outside what the kernel can work with";
    case DMDR_ERROR_LAUNCH: return "the device refused the kernel";
  }
  return "an unknown status";
}

#define DMDR_ENTRY(function, Args)                                                              \
  int dmdr_##function(const Args *args, void *) {                                               \
    if (args == nullptr || args->size != (int64_t)sizeof(Args)) return DMDR_ERROR_STRUCT_SIZE;  \
    const dmdr_status status = check(*args);                                                    \
    if (status == DMDR_OK) kLevel.function(*args);                                              \
    return status;                                                                              \
  }
DMDR_FOR_EACH_KERNEL(DMDR_ENTRY)

}  // extern "C"
