// fp16 pairs as csrc/cuda uses them; see cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>

struct __half2 { _Float16 x, y; };

inline __half2 __floats2half2_rn(float x, float y) { return {static_cast<_Float16>(x), static_cast<_Float16>(y)}; }
inline float2 __half22float2(__half2 both) { return {static_cast<float>(both.x), static_cast<float>(both.y)}; }
