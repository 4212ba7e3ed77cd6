// The scaling kernel behind scale.h.
#include "scale.h"

#include "launch.h"

namespace dmdr {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // per thread

struct ScaleParams {
  Layout layout;
  dmdr_tensor in, out;
  const float *per_sample, *first, *second;
  uint32_t blocks_per_sample;
};

template <class Type>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
  const uint32_t b = blockIdx.x / p.blocks_per_sample;
  const dmdr_tensor in = sample_of(p.in, b), out = sample_of(p.out, b);
  const float factor = p.per_sample != nullptr ? p.per_sample[b] : *p.first * *p.second;
  const uint32_t first = blockIdx.x % p.blocks_per_sample * (kThreads * kVectors) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t vector = first + i * kThreads;
    if (vector >= p.layout.vectors) break;
    const auto place = p.layout.place<Type>(vector);
    float x[Type::kWidth];
    Vector<Type>::load(in, place.offset(in), place.extent).get(x);
#pragma unroll
    for (int j = 0; j < Type::kWidth; ++j) x[j] *= factor;
    Vector<Type>::store(out, place.offset(out), x, place.extent);
  }
}

}  // namespace

int scale(const int64_t *shape, const dmdr_tensor &in, const dmdr_tensor &out, const float *per_sample,
          const float *first, const float *second, void *stream) {
  return with_layout(shape, {&in, &out}, true, [&](auto type, const Layout &layout) {
    const int64_t blocks = ceil_div(layout.vectors, kThreads * kVectors);
    const ScaleParams params = {layout, in, out, per_sample, first, second, static_cast<uint32_t>(blocks)};
    return launch(scale_kernel<decltype(type)>, {layout.batch * blocks, kThreads}, stream, params);
  });
}

}  // namespace dmdr
