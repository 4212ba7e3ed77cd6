// The few device operations that have no portable spelling. The kernels also compile with a host C++ compiler against
// tests/cuda/emulation, which runs them on the CPU: everything that must differ there is in this file.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define DMDR_DEVICE __device__ __forceinline__

// Clusters of blocks exist from sm_90 on; an older device runs the same kernels as clusters of one block.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DMDR_HAS_CLUSTERS 1
#else
#define DMDR_HAS_CLUSTERS 0
#endif

namespace dmdr {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// The block's dynamic shared memory; no kernel here has any other.
template <class T>
DMDR_DEVICE T *shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char dmdr_shared_bytes[];
  return reinterpret_cast<T *>(dmdr_shared_bytes);
#else
  return static_cast<T *>(emulation::shared_memory());
#endif
}

DMDR_DEVICE uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

DMDR_DEVICE float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// The 64-bit product of two 32-bit words in one instruction; written in C it comes with an addition of a zero.
DMDR_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// sqrt to 2^-23 relative in one instruction; 0 for the subnormal.
DMDR_DEVICE float fast_sqrt(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return __builtin_sqrtf(x);
#endif
}

// x limited to [low, high]; NaN stays NaN, where fminf and fmaxf would drop it.
DMDR_DEVICE float clamp_nan(float x, float low, float high) {
#if defined(__CUDA_ARCH__)
  float clamped;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(clamped), "f"(high));
  return clamped;
#else
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}

// A product and a sum that are rounded each by itself: the compiler may not contract them.
DMDR_DEVICE float exact_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}

DMDR_DEVICE float exact_sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  volatile float sum = a + b;
  return sum;
#endif
}

}  // namespace dmdr
