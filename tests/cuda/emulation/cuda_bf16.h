// bf16 pairs as csrc/cuda uses them; see cuda_runtime.h.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat162 { uint16_t x, y; };

// Round to nearest even; a NaN becomes the one that the conversion instruction makes.
inline uint16_t emulated_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {emulated_bf16(x), emulated_bf16(y)}; }
