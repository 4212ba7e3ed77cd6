// layer_norm_modulate: y = (x - mean) rstd (1 + scale) + shift. A row stays in registers as it was loaded, so memory
// sees x once and y once: 4 bytes per element in bf16. shift and scale come from the caches.
#include "norm.cuh"

namespace dmdr {
namespace {

constexpr int kThreads = 128;

struct NormShared {
  BlockSpace<float> mean, variance;
};

// The sum over the threads of a row, of which there are one or four warps.
template <int kRowThreads>
DMDR_DEVICE float row_sum(BlockSpace<float> &space, float x) {
  if constexpr (kRowThreads == kWarp) {
    return warp_reduce(x, Sum());
  } else {
    return block_reduce<kRowThreads>(space, x, Sum());
  }
}

template <class Type, int kRowThreads, int kColumns>
__global__ void __launch_bounds__(kThreads) norm_forward_kernel(const __grid_constant__ NormParams p) {
  using Share = RowShare<Type, kRowThreads, kColumns>;
  constexpr int kWidth = Type::kWidth;
  NormShared &shared = *shared_memory<NormShared>();
  const auto &args = p.args;
  const uint32_t index = blockIdx.x * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  const uint32_t sample = index / p.rows, row = index % p.rows;
  if (sample >= args.shape[0]) return;
  const Share share = {p.features, threadIdx.x % kRowThreads, p.aligned};

  const int64_t from = row_offset(args.x, sample, row);
  Vector<Type> held[Share::kVectors];
  float total = 0.f;
#pragma unroll
  for (int v = 0; v < Share::kVectors; ++v)
    held[v] = share.has(v) ? share.load(args.x, from, v) : Vector<Type>::zero();
#pragma unroll
  for (int v = 0; v < Share::kVectors; ++v) {
    float x[kWidth];
    held[v].get(x);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) total += x[j];
  }
  const float mean = row_sum<kRowThreads>(shared.mean, total) / static_cast<float>(p.features);

  // The variance about the mean: no cancellation.
  total = 0.f;
#pragma unroll
  for (int v = 0; v < Share::kVectors; ++v) {
    if (!share.has(v)) continue;
    float x[kWidth];
    held[v].get(x);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) total += share.inside(v, j) ? (x[j] - mean) * (x[j] - mean) : 0.f;
  }
  const float variance = row_sum<kRowThreads>(shared.variance, total) / static_cast<float>(p.features);
  const float rstd = __frsqrt_rn(variance + static_cast<float>(args.eps));
  if (share.lane == 0) {
    args.mean[index] = mean;
    args.rstd[index] = rstd;
  }

  const int64_t at_shift = row_offset(args.shift, sample, row), at_scale = row_offset(args.scale, sample, row);
  const int64_t to = row_offset(args.y, sample, row);
#pragma unroll
  for (int v = 0; v < Share::kVectors; ++v) {
    if (!share.has(v)) continue;
    float x[kWidth], shift[kWidth], scale[kWidth];
    const Vector<Type> scale_vector = share.load(args.scale, at_scale, v);
    share.load(args.shift, at_shift, v).get(shift);
    scale_vector.get(scale);
    held[v].get(x);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) x[j] = (x[j] - mean) * rstd * (1.f + scale[j]) + shift[j];
    share.store(args.y, to, v, x);
  }
}

template <class Type, int kRowThreads, int kColumns>
int run(const NormParams &params, void *stream) {
  const int64_t rows = params.args.shape[0] * params.args.shape[1];
  const Grid grid = {ceil_div(rows, kThreads / kRowThreads), kThreads, sizeof(NormShared)};
  return launch(norm_forward_kernel<Type, kRowThreads, kColumns>, grid, stream, params);
}

}  // namespace
}  // namespace dmdr

using namespace dmdr;

extern "C" int dmdr_layer_norm_modulate_fwd(const dmdr_layer_norm_modulate_args *args, void *stream) {
  if (wrong_size(args)) return DMDR_ERROR_STRUCT_SIZE;
  return with_rows(*args, {&args->x, &args->shift, &args->scale, &args->y}, [&](auto type, const NormParams &params) {
    using Type = decltype(type);
    if (params.features <= 32 * kWarp) return run<Type, kWarp, 32>(params, stream);
    if (params.features <= 64 * kWarp) return run<Type, kWarp, 64>(params, stream);
    if (params.features <= 32 * kThreads) return run<Type, kThreads, 32>(params, stream);
    return run<Type, kThreads, 64>(params, stream);
  });
}
