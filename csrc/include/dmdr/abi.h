/* The C ABI between dmdr_fast and its kernel libraries (libdmdr_cpu, libdmdr_cuda).
 *
 * Every function is   int dmdr_<op>_<fwd|bwd>(const dmdr_<op>_args *args, void *stream)
 * and returns a dmdr_status. Kernels allocate nothing, keep no state, throw nothing and read no environment.
 *
 * Conventions of the argument structs
 *   - `size` is sizeof of the struct as the caller knows it: a caller built against another version gets
 *     DMDR_ERROR_STRUCT_SIZE and nothing is read.
 *   - Every field is eight bytes, so there is no padding and any language can lay a struct out.
 *   - A tensor is a dmdr_tensor: its elements are at data + (sum_i index_i stride_i + j) elements. The op's `shape`
 *     holds DMDR_OUTER outer sizes (unused ones are 1) and then the inner size, along which all are contiguous.
 *   - Outer dimension 0 is the batch. "Per sample" arrays are contiguous float[batch].
 *   - data NULL marks an optional tensor as absent. Outputs never overlap inputs.
 *   - Results depend on neither `num_threads` nor the addresses: sums run in a fixed order.
 *   - `stream` is a cudaStream_t for the CUDA library; the CPU library ignores it.
 */
#ifndef DMDR_ABI_H
#define DMDR_ABI_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DMDR_ABI_VERSION 2
#define DMDR_OUTER 5
#define DMDR_EXPORT __attribute__((visibility("default")))

typedef enum dmdr_status {
  DMDR_OK = 0,
  DMDR_ERROR_STRUCT_SIZE = 1, /* args->size is not this library's */
  DMDR_ERROR_DTYPE = 2,       /* a dtype code that is none of dmdr_dtype */
  DMDR_ERROR_ARGUMENT = 3,    /* a size, mode or pointer the op cannot work with */
  DMDR_ERROR_LAUNCH = 4       /* the device refused the kernel */
} dmdr_status;

typedef enum dmdr_dtype { DMDR_F32 = 0, DMDR_BF16 = 1, DMDR_F16 = 2 } dmdr_dtype;

typedef struct dmdr_tensor {
  void *data;
  int64_t dtype; /* dmdr_dtype */
  int64_t stride[DMDR_OUTER];
} dmdr_tensor;

/* The version of this header; a caller refuses a library whose number differs. */
DMDR_EXPORT int64_t dmdr_abi_version(void);
/* One sentence for a dmdr_status, in static storage. */
DMDR_EXPORT const char *dmdr_error_string(int status);
/* libdmdr_cpu: the instruction-set level in use: "baseline", "v3" (AVX2), "v4" (AVX-512) or
 * "v4_bf16" (and its bf16 products). */
DMDR_EXPORT const char *dmdr_cpu_level(void);
/* libdmdr_cpu: asks the system for huge pages where a fresh output of `bytes` bytes will be written. */
DMDR_EXPORT void dmdr_cpu_expect_writes(void *data, int64_t bytes);

/* ---- renoise: out = alpha_b x0 + sigma_b noise -------------------------------------------------------------------
 * noise absent: N(0, 1) drawn from seed = (key, stream); element i of the stream, i = offset + row-major index.
 * x0 absent: out = noise (normal_noise), with alpha and sigma unread. bwd: out = alpha_b x0, with sigma unread.
 * scale_bwd: sample_sum_b = sum x0 noise over the sample. */
typedef struct dmdr_renoise_args {
  int64_t size, num_threads;
  int64_t shape[DMDR_OUTER + 1];
  dmdr_tensor x0, noise, out;
  const float *alpha, *sigma; /* per sample */
  const int64_t *seed;        /* [2] */
  int64_t offset;
  float *sample_sum;          /* per sample */
} dmdr_renoise_args;
DMDR_EXPORT int dmdr_renoise_fwd(const dmdr_renoise_args *args, void *stream);
DMDR_EXPORT int dmdr_renoise_bwd(const dmdr_renoise_args *args, void *stream);
DMDR_EXPORT int dmdr_renoise_scale_bwd(const dmdr_renoise_args *args, void *stream);

/* ---- dmd_gradient ------------------------------------------------------------------------------------------------
 * x0_hat(p) = keep x_t + gain p;  g = weight (x0_hat(fake) - x0_hat(real)) / norm;  norm = mean |x0 - x0_hat(real)|.
 * s = 2 factor / count (mean) or 2 factor (sum), where count is what the mask selects. fwd writes norm [batch],
 * loss [1] = 0.5 s sum g^2, grad = g and loss_scale [1] = s; or, if scaled, grad = s g and loss_scale = 1 (then a mean
 * has no mask: s must be known before the first g). bwd writes grad = grad_loss loss_scale pred_fake, where pred_fake
 * holds the grad of fwd. */
typedef enum dmdr_prediction { DMDR_FLOW = 0, DMDR_EPS = 1, DMDR_V = 2, DMDR_X0 = 3 } dmdr_prediction;
typedef enum dmdr_cfg_mode { DMDR_CFG_STANDARD = 0, DMDR_CFG_OFFSET = 1 } dmdr_cfg_mode;
typedef enum dmdr_normalizer { DMDR_PER_SAMPLE = 0, DMDR_GLOBAL = 1, DMDR_NO_NORMALIZER = 2 } dmdr_normalizer;
typedef enum dmdr_eps_mode { DMDR_EPS_ADD = 0, DMDR_EPS_CLAMP = 1, DMDR_EPS_NONE = 2 } dmdr_eps_mode;
typedef enum dmdr_nan_policy {
  DMDR_NAN_ZERO = 0,        /* what is not finite in grad's dtype becomes 0 */
  DMDR_NAN_TORCH = 1,       /* torch.nan_to_num: NaN 0, infinities the largest value of grad's dtype */
  DMDR_NAN_ZERO_SAMPLE = 2, /* a sample with such an element becomes 0 */
  DMDR_NAN_KEEP = 3
} dmdr_nan_policy;

#define DMDR_DMD_BLOCK 8192 /* inner elements per partial sum */
typedef struct dmdr_dmd_gradient_args {
  int64_t size, num_threads;
  int64_t shape[DMDR_OUTER + 1];
  dmdr_tensor x0, x_t, pred_fake, pred_real, pred_real_uncond;
  dmdr_tensor mask;                             /* optional; bytes, 0 or 1; dtype unread */
  dmdr_tensor grad;
  const float *sigma, *alpha, *cfg, *weight;    /* per sample; alpha, cfg and weight optional */
  double cfg_scale, eps, factor;
  int64_t cfg_mode, prediction, normalizer, eps_mode, nan_policy;
  int64_t reduction_sum;                        /* 1: sum, 0: mean */
  int64_t scaled;                               /* 1: grad is the loss's gradient, 0: g */
  float *norm, *loss, *loss_scale;
  const float *grad_loss;                       /* bwd: [1] */
  double *workspace;                            /* dmdr_dmd_gradient_workspace() doubles, uninitialised */
} dmdr_dmd_gradient_args;
/* outer_rows is the product of the outer sizes. */
DMDR_EXPORT int64_t dmdr_dmd_gradient_workspace(int64_t outer_rows, int64_t inner);
DMDR_EXPORT int dmdr_dmd_gradient_fwd(const dmdr_dmd_gradient_args *args, void *stream);
DMDR_EXPORT int dmdr_dmd_gradient_bwd(const dmdr_dmd_gradient_args *args, void *stream);

/* ---- multi_lora: out = base + low_rank B, low_rank = scale_b (x A) -----------------------------------------------
 * x, base, out, grad and grad_x are [batch, rows, features]: strides 0 and 1; A and B are matrices: stride 0.
 * A sample of scale 0 is not read: its low_rank is 0, its out is base and it adds nothing to a gradient. */
#define DMDR_LORA_UNIT 64  /* rows that are worked on together */
#define DMDR_LORA_PAD 16   /* packed matrices have rows of a multiple of so many floats */
/* Partial sums of the weight gradients: at least four units each, for the sums cost memory, and at most 32. */
#define DMDR_LORA_PARTS(units) ((units) < 8 ? 1 : (units) < 128 ? (units) / 4 : 32)
typedef struct dmdr_multi_lora_args {
  int64_t size, num_threads;
  int64_t batch, rows, in_features, rank, out_features;
  dmdr_tensor x, base, out, A, B;
  dmdr_tensor grad, grad_x;                     /* bwd; grad_x optional */
  const float *scale;                           /* per sample */
  float *low_rank;                              /* contiguous [batch, rows, rank]: fwd writes it, bwd reads it */
  float *grad_a, *grad_b;                       /* bwd, optional: contiguous [in, rank] and [rank, out] */
  float *workspace;                             /* dmdr_multi_lora_workspace() floats, uninitialised */
} dmdr_multi_lora_args;
DMDR_EXPORT int64_t dmdr_multi_lora_workspace(int64_t batch, int64_t rows, int64_t in_features, int64_t rank,
                                              int64_t out_features, int64_t backward);
DMDR_EXPORT int dmdr_multi_lora_fwd(const dmdr_multi_lora_args *args, void *stream);
DMDR_EXPORT int dmdr_multi_lora_bwd(const dmdr_multi_lora_args *args, void *stream);

/* ---- layer_norm_modulate: y = (x - mean) rstd (1 + scale) + shift ------------------------------------------------
 * shape is [batch, rows, 1, 1, 1, D]. shift and scale broadcast by strides of 0. mean and rstd: contiguous
 * [batch, rows], written by fwd and read by bwd. */
typedef enum dmdr_gather {  /* over which rows the gradient of a modulation vector is summed */
  DMDR_GATHER_NONE = 0,     /* not wanted */
  DMDR_GATHER_PER_ROW = 1,  /* none: it is [batch, rows, D] */
  DMDR_GATHER_SAMPLE = 2,   /* [batch, 1, D] */
  DMDR_GATHER_ALL = 3       /* [1, 1, D] */
} dmdr_gather;
#define DMDR_NORM_BLOCK 64 /* rows per partial sum */
typedef struct dmdr_layer_norm_modulate_args {
  int64_t size, num_threads;
  int64_t shape[DMDR_OUTER + 1];
  dmdr_tensor x, shift, scale, y;
  dmdr_tensor grad_y, grad_x, grad_shift, grad_scale; /* bwd; the last three optional */
  float *mean, *rstd;
  double eps;
  int64_t gather; /* bwd: dmdr_gather of grad_shift and grad_scale */
  float *workspace; /* bwd: dmdr_modulation_workspace(batch, rows, D, 2) floats, uninitialised */
} dmdr_layer_norm_modulate_args;
DMDR_EXPORT int64_t dmdr_modulation_workspace(int64_t batch, int64_t rows, int64_t features, int64_t vectors);
DMDR_EXPORT int dmdr_layer_norm_modulate_fwd(const dmdr_layer_norm_modulate_args *args, void *stream);
DMDR_EXPORT int dmdr_layer_norm_modulate_bwd(const dmdr_layer_norm_modulate_args *args, void *stream);

/* ---- gated_residual: residual = x + gate h; with y also y = layer_norm_modulate(residual as rounded) -------------
 * Shapes as above; gate broadcasts like shift and scale. bwd: at least one of grad_residual and grad_y is present;
 * without grad_y nothing of the norm is read. */
typedef struct dmdr_gated_residual_args {
  int64_t size, num_threads;
  int64_t shape[DMDR_OUTER + 1];
  dmdr_tensor x, h, gate, shift, scale, residual, y;
  dmdr_tensor grad_residual, grad_y, grad_x, grad_h, grad_gate, grad_shift, grad_scale;
  float *mean, *rstd;
  double eps;
  int64_t gather_gate, gather; /* bwd: dmdr_gather of grad_gate, and of grad_shift and grad_scale */
  float *workspace;            /* bwd: dmdr_modulation_workspace(batch, rows, D, 3) floats, uninitialised */
} dmdr_gated_residual_args;
DMDR_EXPORT int dmdr_gated_residual_fwd(const dmdr_gated_residual_args *args, void *stream);
DMDR_EXPORT int dmdr_gated_residual_bwd(const dmdr_gated_residual_args *args, void *stream);

/* ---- rms_norm_scale: y = x rstd weight scale; with residual y = residual + x rstd weight scale -------------------
 * Shapes as above; weight is [D] and optional, scale broadcasts like shift and scale. rstd: contiguous [batch, rows],
 * written by fwd and read by bwd. bwd reads no residual: its gradient is grad_y. */
typedef struct dmdr_rms_norm_scale_args {
  int64_t size, num_threads;
  int64_t shape[DMDR_OUTER + 1];
  dmdr_tensor x, weight, scale, residual, y;
  dmdr_tensor grad_y, grad_x, grad_weight, grad_scale; /* bwd; the last three optional */
  float *rstd;
  double eps;
  int64_t gather_weight, gather; /* bwd: dmdr_gather of grad_weight, and of grad_scale */
  float *workspace;              /* bwd: dmdr_modulation_workspace(batch, rows, D, 2) floats, uninitialised */
} dmdr_rms_norm_scale_args;
DMDR_EXPORT int dmdr_rms_norm_scale_fwd(const dmdr_rms_norm_scale_args *args, void *stream);
DMDR_EXPORT int dmdr_rms_norm_scale_bwd(const dmdr_rms_norm_scale_args *args, void *stream);

/* ---- gated_activation: out = value act(gate) --------------------------------------------------------------------- */
typedef enum dmdr_activation { DMDR_GELU = 0, DMDR_GELU_TANH = 1, DMDR_SILU = 2 } dmdr_activation;
typedef struct dmdr_gated_activation_args {
  int64_t size, num_threads;
  int64_t shape[DMDR_OUTER + 1];
  dmdr_tensor value, gate, out;
  dmdr_tensor grad, grad_value, grad_gate; /* bwd */
  int64_t activation;
} dmdr_gated_activation_args;
DMDR_EXPORT int dmdr_gated_activation_fwd(const dmdr_gated_activation_args *args, void *stream);
DMDR_EXPORT int dmdr_gated_activation_bwd(const dmdr_gated_activation_args *args, void *stream);

/* ---- qk_norm_rope: y = x rstd weight; out = y cos + rot(y) sin ----------------------------------------------------
 * x, out, grad and grad_x are [batch, rows, heads, features]: strides 0, 1 and 2. cos and sin are [batch, rows,
 * features] and broadcast by strides of 0. rot: (y0, y1) -> (-y1, y0) over neighbours (interleaved) or halves. */
#define DMDR_ROPE_FEATURES 1024 /* at most so many features a head in bwd */
typedef struct dmdr_qk_side {
  int64_t heads;
  dmdr_tensor x, weight, out;  /* weight optional */
  dmdr_tensor grad, grad_x;    /* bwd; a side without grad is left out */
  float *rstd;                 /* contiguous [batch, rows, heads], written by fwd and read by bwd */
  float *grad_weight;          /* bwd, optional: [features] */
} dmdr_qk_side;
typedef struct dmdr_qk_norm_rope_args {
  int64_t size, num_threads;
  int64_t batch, rows, features;
  dmdr_qk_side q, k;
  dmdr_tensor cos, sin; /* optional, both or none */
  double eps;
  int64_t interleaved;
  float *workspace; /* bwd: dmdr_qk_norm_rope_workspace() floats, uninitialised */
} dmdr_qk_norm_rope_args;
DMDR_EXPORT int64_t dmdr_qk_norm_rope_workspace(int64_t batch, int64_t rows, int64_t features);
DMDR_EXPORT int dmdr_qk_norm_rope_fwd(const dmdr_qk_norm_rope_args *args, void *stream);
DMDR_EXPORT int dmdr_qk_norm_rope_bwd(const dmdr_qk_norm_rope_args *args, void *stream);

/* ---- sde_step: x' = a x + b v + s n, log-prob of x' ---------------------------------------------------------------
 * fwd writes mean (contiguous float32), logprob and std [batch]; with seed also next_sample, which is read otherwise.
 * bwd: m = grad_next + grad_mean + grad_logprob_b d logprob / d mean; grad_x = a m, grad_v = b m. */
typedef enum dmdr_sde_kind { DMDR_SDE_FLOW_GRPO = 0, DMDR_SDE_DANCE = 1, DMDR_SDE_CPS = 2 } dmdr_sde_kind;
#define DMDR_SDE_BLOCK 8192 /* inner elements per partial sum */
typedef struct dmdr_sde_step_args {
  int64_t size, num_threads;
  int64_t shape[DMDR_OUTER + 1];
  dmdr_tensor x, v, next_sample, mean;
  dmdr_tensor grad_next, grad_mean, grad_x, grad_v; /* bwd, all optional */
  const float *sigma, *sigma_next;                  /* per sample */
  const int64_t *seed;                              /* [2] */
  int64_t offset, kind;
  double eta;
  float *logprob, *std;                             /* per sample */
  const float *grad_logprob;                        /* bwd, optional; per sample */
  double *workspace;                                /* fwd: dmdr_sde_step_workspace() doubles, uninitialised */
} dmdr_sde_step_args;
/* outer_rows is the product of the outer sizes. */
DMDR_EXPORT int64_t dmdr_sde_step_workspace(int64_t outer_rows, int64_t inner);
DMDR_EXPORT int dmdr_sde_step_fwd(const dmdr_sde_step_args *args, void *stream);
DMDR_EXPORT int dmdr_sde_step_bwd(const dmdr_sde_step_args *args, void *stream);

/* ---- preprocess_reward: out = (resize((clamp(x, low, high) - low) / (high - low)) - mean) / std -------------------
 * image is [batch, channels, height, width] and out [batch, channels, out_height, out_width]: strides 0, 1 and 2.
 * inside: contiguous bytes [batch, channels, height, ceil(width / 8)], bit j of byte k is low <= x[8 k + j] <= high;
 * fwd writes it where present. bwd reads out (the incoming gradient) and inside, and writes image (its gradient). */
typedef struct dmdr_preprocess_reward_args {
  int64_t size, num_threads;
  int64_t batch, channels, height, width, out_height, out_width;
  dmdr_tensor image, out;
  uint8_t *inside;
  const double *mean, *std; /* [channels] */
  double low, high;
  int64_t antialias;
  int64_t *workspace; /* dmdr_preprocess_reward_workspace() words of 8 bytes, uninitialised */
} dmdr_preprocess_reward_args;
DMDR_EXPORT int64_t dmdr_preprocess_reward_workspace(int64_t height, int64_t width, int64_t out_height,
                                                     int64_t out_width, int64_t antialias, int64_t num_threads);
DMDR_EXPORT int dmdr_preprocess_reward_fwd(const dmdr_preprocess_reward_args *args, void *stream);
DMDR_EXPORT int dmdr_preprocess_reward_bwd(const dmdr_preprocess_reward_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
