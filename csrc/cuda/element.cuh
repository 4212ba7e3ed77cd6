// Elements in memory and in registers: fp32, bf16, fp16, and vectors of them moved by 16-byte accesses.
//
// Most calls have one dtype, aligned pointers and whole vectors: the kernels are compiled for each such dtype. All
// others (mixed dtypes, odd sizes, strided rows, odd addresses) take the instance for Any, which decides at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.cuh"
#include "dmdr/abi.h"

namespace dmdr {

constexpr int kAccessBytes = 16;

template <class Pair>
DMDR_DEVICE uint32_t as_word(const Pair &pair) {
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// kPerWord elements share 32 bits, the first in the lower half.
struct Float32 {
  static constexpr int kBytes = 4, kWidth = 4, kPerWord = 1;
  static constexpr bool kFixed = true;
  static DMDR_DEVICE void unpack(uint32_t word, float *x) { x[0] = bits_float(word); }
  static DMDR_DEVICE uint32_t pack(const float *x) { return float_bits(x[0]); }
};

struct Bfloat16 {
  static constexpr int kBytes = 2, kWidth = 8, kPerWord = 2;
  static constexpr bool kFixed = true;
  static DMDR_DEVICE void unpack(uint32_t word, float *x) {
    x[0] = bits_float(word << 16);
    x[1] = bits_float(word & 0xffff0000u);
  }
  static DMDR_DEVICE uint32_t pack(const float *x) {
    return as_word(__floats2bfloat162_rn(x[0], x[1]));
  }
};

struct Float16 {
  static constexpr int kBytes = 2, kWidth = 8, kPerWord = 2;
  static constexpr bool kFixed = true;
  static DMDR_DEVICE void unpack(uint32_t word, float *x) {
    __half2 halves;
    memcpy(&halves, &word, sizeof word);
    const float2 both = __half22float2(halves);
    x[0] = both.x;
    x[1] = both.y;
  }
  static DMDR_DEVICE uint32_t pack(const float *x) {
    return as_word(__floats2half2_rn(x[0], x[1]));
  }
};

// What is known only at run time: each tensor's dtype, whether a vector is whole, whether all addresses are aligned.
struct Any {
  static constexpr int kWidth = 8;
  static constexpr bool kFixed = false;
};

// How much of a vector there is, and how it may be accessed; a fixed type never looks at it.
struct Extent {
  int count;     // elements, at most the vector's
  bool aligned;  // its address is a multiple of 16 bytes
};

template <class Type>
DMDR_DEVICE const char *address(const dmdr_tensor &tensor, int64_t element) {
  return static_cast<const char *>(tensor.data) + element * Type::kBytes;
}
template <class Type>
DMDR_DEVICE char *mutable_address(const dmdr_tensor &tensor, int64_t element) {
  return static_cast<char *>(tensor.data) + element * Type::kBytes;
}

// kCount consecutive elements as they lie in memory: a 16-bit type takes half the registers of its floats.
template <class Type, int kCount = Type::kWidth>
struct Vector {
  static constexpr int kWords = kCount / Type::kPerWord;
  uint32_t word[kWords];

  static DMDR_DEVICE Vector load(const dmdr_tensor &tensor, int64_t element, Extent) {
    Vector vector;
    const uint4 *const from = reinterpret_cast<const uint4 *>(address<Type>(tensor, element));
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 four = from[i];
      vector.word[4 * i] = four.x;
      vector.word[4 * i + 1] = four.y;
      vector.word[4 * i + 2] = four.z;
      vector.word[4 * i + 3] = four.w;
    }
    return vector;
  }
  static DMDR_DEVICE Vector zero() {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kWords; ++i) vector.word[i] = 0;
    return vector;
  }
  DMDR_DEVICE void get(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) Type::unpack(word[i], x + i * Type::kPerWord);
  }
  static DMDR_DEVICE void store(const dmdr_tensor &tensor, int64_t element, const float (&x)[kCount], Extent) {
    uint4 *const to = reinterpret_cast<uint4 *>(mutable_address<Type>(tensor, element));
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const float *const part = x + 4 * i * Type::kPerWord;
      to[i] = make_uint4(Type::pack(part), Type::pack(part + Type::kPerWord), Type::pack(part + 2 * Type::kPerWord),
                         Type::pack(part + 3 * Type::kPerWord));
    }
  }
};

// One element, for the ends of rows and odd addresses.
template <class Type>
DMDR_DEVICE float load_element(const dmdr_tensor &tensor, int64_t element) {
  if constexpr (Type::kBytes == 4) {
    return *reinterpret_cast<const float *>(address<Type>(tensor, element));
  } else {
    float both[2];
    Type::unpack(*reinterpret_cast<const uint16_t *>(address<Type>(tensor, element)), both);
    return both[0];
  }
}
template <class Type>
DMDR_DEVICE void store_element(const dmdr_tensor &tensor, int64_t element, float x) {
  if constexpr (Type::kBytes == 4) {
    *reinterpret_cast<float *>(mutable_address<Type>(tensor, element)) = x;
  } else {
    const float both[2] = {x, 0.f};
    *reinterpret_cast<uint16_t *>(mutable_address<Type>(tensor, element)) = static_cast<uint16_t>(Type::pack(both));
  }
}

template <int kCount>
struct Vector<Any, kCount> {
  float value[kCount];

  static DMDR_DEVICE Vector load(const dmdr_tensor &tensor, int64_t element, Extent extent) {
    if (tensor.dtype == DMDR_BF16) return load_as<Bfloat16>(tensor, element, extent);
    if (tensor.dtype == DMDR_F16) return load_as<Float16>(tensor, element, extent);
    return load_as<Float32>(tensor, element, extent);
  }
  static DMDR_DEVICE Vector zero() {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kCount; ++i) vector.value[i] = 0.f;
    return vector;
  }
  DMDR_DEVICE void get(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = value[i];
  }
  static DMDR_DEVICE void store(const dmdr_tensor &tensor, int64_t element, const float (&x)[kCount], Extent extent) {
    if (tensor.dtype == DMDR_BF16)
      store_as<Bfloat16>(tensor, element, x, extent);
    else if (tensor.dtype == DMDR_F16)
      store_as<Float16>(tensor, element, x, extent);
    else
      store_as<Float32>(tensor, element, x, extent);
  }

 private:
  template <class Type>
  static DMDR_DEVICE Vector load_as(const dmdr_tensor &tensor, int64_t element, Extent extent) {
    Vector vector = zero();
    if (extent.aligned && extent.count == kCount) {
      Vector<Type, kCount>::load(tensor, element, extent).get(vector.value);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i < extent.count) vector.value[i] = load_element<Type>(tensor, element + i);
    }
    return vector;
  }
  template <class Type>
  static DMDR_DEVICE void store_as(const dmdr_tensor &tensor, int64_t element, const float (&x)[kCount],
                                   Extent extent) {
    if (extent.aligned && extent.count == kCount) {
      Vector<Type, kCount>::store(tensor, element, x, extent);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i < extent.count) store_element<Type>(tensor, element + i, x[i]);
    }
  }
};

}  // namespace dmdr
