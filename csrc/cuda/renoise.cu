// renoise and normal_noise: out = alpha_b x0 + sigma_b noise, the noise given or drawn here, and their gradients.
#include "launch.h"
#include "philox.cuh"
#include "reduce.cuh"
#include "scale.h"

namespace dmdr {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;  // the key schedule is then set up once for 32 elements

struct RenoiseParams {
  Layout layout;
  dmdr_tensor x0, noise, out;
  const float *alpha, *sigma;
  const int64_t *seed;
  int64_t offset;
  uint32_t blocks_per_sample;
};

// A block's vectors of one sample, kThreads apart: body(index of the vector).
template <class Body>
DMDR_DEVICE void for_block_vectors(uint32_t block, uint32_t vectors, Body body) {
  const uint32_t first = block * (kThreads * kVectorsPerThread) + threadIdx.x;
#pragma unroll 1
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const uint32_t vector = first + i * kThreads;
    if (vector >= vectors) break;
    body(vector);
  }
}

template <class Type>
__global__ void __launch_bounds__(kThreads) renoise_mix_kernel(const __grid_constant__ RenoiseParams p) {
  const uint32_t b = blockIdx.x / p.blocks_per_sample;
  const dmdr_tensor x0 = sample_of(p.x0, b), noise = sample_of(p.noise, b), out = sample_of(p.out, b);
  const float alpha = p.alpha[b], sigma = p.sigma[b];
  for_block_vectors(blockIdx.x % p.blocks_per_sample, p.layout.vectors, [&](uint32_t i) {
    const auto place = p.layout.place<Type>(i);
    float x[Type::kWidth], z[Type::kWidth];
    const auto from = Vector<Type>::load(x0, place.offset(x0), place.extent);
    Vector<Type>::load(noise, place.offset(noise), place.extent).get(z);
    from.get(x);
#pragma unroll
    for (int j = 0; j < Type::kWidth; ++j) x[j] = alpha * x[j] + sigma * z[j];
    Vector<Type>::store(out, place.offset(out), x, place.extent);
  });
}

// kPlain: the noise itself. A fixed type has whole blocks of the stream in its vectors.
template <class Type, bool kPlain>
__global__ void __launch_bounds__(kThreads) renoise_draw_kernel(const __grid_constant__ RenoiseParams p) {
  const uint32_t b = blockIdx.x / p.blocks_per_sample;
  const dmdr_tensor x0 = sample_of(p.x0, b), out = sample_of(p.out, b);
  const float alpha = kPlain ? 0.f : p.alpha[b], sigma = kPlain ? 1.f : p.sigma[b];
  const Stream stream(p.seed);
  const uint64_t origin = static_cast<uint64_t>(p.offset) + static_cast<uint64_t>(b) * p.layout.sample;
  for_block_vectors(blockIdx.x % p.blocks_per_sample, p.layout.vectors, [&](uint32_t i) {
    const auto place = p.layout.place<Type>(i);
    float x[Type::kWidth], z[Type::kWidth];
    auto from = Vector<Type>::zero();
    if (!kPlain) from = Vector<Type>::load(x0, place.offset(x0), place.extent);
    const uint64_t element = origin + place.in_sample(p.layout);
    if constexpr (Type::kFixed) {
#pragma unroll
      for (int j = 0; j < Type::kWidth; j += 4) draw_block(stream, element / 4 + j / 4, z + j);
    } else {
      draw(stream, element, z);
    }
    from.get(x);
#pragma unroll
    for (int j = 0; j < Type::kWidth; ++j) x[j] = kPlain ? z[j] : alpha * x[j] + sigma * z[j];
    Vector<Type>::store(out, place.offset(out), x, place.extent);
  });
}

// ---- the sum of grad * factor over each sample: one cluster per sample ----------------------------------------------
constexpr int kSumThreads = 512;

struct SumParams {
  Layout layout;
  dmdr_tensor grad, factor;
  float *sample_sum;
};
struct SumShared {
  BlockSpace<double> block;
  ClusterSpace<double> cluster;
};

template <class Type>
__global__ void __launch_bounds__(kSumThreads) renoise_sum_kernel(const __grid_constant__ SumParams p) {
  SumShared &shared = *shared_memory<SumShared>();
  const Cluster cluster;
  const uint32_t b = blockIdx.x / cluster.size();
  const dmdr_tensor grad = sample_of(p.grad, b), factor = sample_of(p.factor, b);
  double total = 0.;
  for (uint32_t i = cluster.rank() * kSumThreads + threadIdx.x; i < p.layout.vectors; i += cluster.size() * kSumThreads) {
    const auto place = p.layout.place<Type>(i);
    float x[Type::kWidth], y[Type::kWidth], run = 0.f;
    const auto from = Vector<Type>::load(grad, place.offset(grad), place.extent);
    Vector<Type>::load(factor, place.offset(factor), place.extent).get(y);
    from.get(x);
#pragma unroll
    for (int j = 0; j < Type::kWidth; ++j) run += x[j] * y[j];
    total += run;
  }
  total = cluster_reduce(cluster, shared.cluster, block_reduce<kSumThreads>(shared.block, total, Sum()), Sum());
  if (cluster.rank() == 0 && threadIdx.x == 0) p.sample_sum[b] = static_cast<float>(total);
}


}  // namespace
}  // namespace dmdr

using namespace dmdr;

extern "C" {

int dmdr_renoise_fwd(const dmdr_renoise_args *args, void *stream) {
  if (wrong_size(args)) return DMDR_ERROR_STRUCT_SIZE;
  if (args->offset < 0) return DMDR_ERROR_ARGUMENT;
  const bool drawn = args->noise.data == nullptr, plain = args->x0.data == nullptr;
  // Vectors of a fixed type start where a block of the stream does.
  const bool fixed = !drawn || args->offset % 4 == 0;
  return with_layout(args->shape, {&args->x0, &args->noise, &args->out}, fixed, [&](auto type, const Layout &layout) {
    using Type = decltype(type);
    const int64_t blocks = ceil_div(layout.vectors, kThreads * kVectorsPerThread);
    const RenoiseParams params = {layout,      args->x0,   args->noise,  args->out, args->alpha,
                                  args->sigma, args->seed, args->offset, static_cast<uint32_t>(blocks)};
    const Grid grid = {layout.batch * blocks, kThreads};
    if (!drawn) return launch(renoise_mix_kernel<Type>, grid, stream, params);
    return launch(plain ? renoise_draw_kernel<Type, true> : renoise_draw_kernel<Type, false>, grid, stream, params);
  });
}

int dmdr_renoise_bwd(const dmdr_renoise_args *args, void *stream) {
  if (wrong_size(args)) return DMDR_ERROR_STRUCT_SIZE;
  return scale(args->shape, args->x0, args->out, args->alpha, nullptr, nullptr, stream);
}

int dmdr_renoise_scale_bwd(const dmdr_renoise_args *args, void *stream) {
  if (wrong_size(args)) return DMDR_ERROR_STRUCT_SIZE;
  return with_layout(args->shape, {&args->x0, &args->noise}, true, [&](auto type, const Layout &layout) {
    const int cluster = has_clusters() ? kPortableCluster : 1;
    const Grid grid = {layout.batch * cluster, kSumThreads, sizeof(SumShared), cluster};
    const SumParams params = {layout, args->x0, args->noise, args->sample_sum};
    return launch(renoise_sum_kernel<decltype(type)>, grid, stream, params);
  });
}

}  // extern "C"
