// Vectors of the native width in GNU vector extensions, and their loads and stores from fp32, bf16 and fp16.
//
// One source serves every instruction set: an operation on F is one instruction where the hardware has it. A tail
// goes through the same vector operations as the body, so an element's bits never depend on where it lies.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "dmdr/abi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DMDR_INLINE inline __attribute__((always_inline))

namespace dmdr {
namespace DMDR_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F __attribute__((vector_size(kLanes * 4)));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));  // also what a comparison of F yields: 0 or -1
typedef uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef uint16_t H __attribute__((vector_size(kLanes * 2)));

DMDR_INLINE F splat(float x) { return x - F{}; }  // keeps -0
DMDR_INLINE U bits(F x) { return (U)x; }
DMDR_INLINE F from_bits(U x) { return (F)x; }
DMDR_INLINE F abs(F x) { return from_bits(bits(x) & 0x7fffffffu); }
DMDR_INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }

DMDR_INLINE F sqrt(F x) {
  F root;
  for (int lane = 0; lane < kLanes; ++lane) root[lane] = __builtin_sqrtf(x[lane]);
  return root;
}

// Pairwise, so the order is the same whatever the compiler does.
DMDR_INLINE double sum(F x) {
  double part[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) part[lane] = x[lane];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  return part[0];
}

// fp32 adds at most this many elements, kLanes at a time, before a sum moves to fp64: so its relative error stays under
// 1e-6 whatever the size.
constexpr int64_t kRun = 64 * kLanes;

// Unsigned integers of two bytes, or of one, as four bytes and back (what fits). GCC's __builtin_convertvector works in
// halves: five instructions for one. maskz: GCC 12 warns of the plain forms' undefined vector.
DMDR_INLINE U widened(H x) {
#if defined(__AVX512F__)
  return (U)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, U);
#endif
}
DMDR_INLINE H narrowed(U x) {
#if defined(__AVX512F__)
  return (H)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
#elif defined(__AVX2__)
  return (H)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
  return __builtin_convertvector(x, H);
#endif
}
DMDR_INLINE U widened_bytes(const char *p) {
#if defined(__AVX512F__)
  return (U)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, U);
#endif
}

// ---- element types: how one vector is read and written -------------------------------------------------------------
struct Float32 {
  static constexpr int64_t kBytes = 4;
  static constexpr bool kIsBfloat16 = false;
  static DMDR_INLINE F load(const char *p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static DMDR_INLINE F rounded(F x) { return x; }
};

struct Bfloat16 {
  static constexpr int64_t kBytes = 2;
  static constexpr bool kIsBfloat16 = true;
  static DMDR_INLINE F load(const char *p) {
    H x;
    std::memcpy(&x, p, sizeof x);
    return from_bits(widened(x) << 16);
  }
  // Round to nearest even; a NaN becomes PyTorch's 0x7fc0 instead of being rounded into an infinity.
  static DMDR_INLINE H rounded(F x) {
    const U u = bits(x);
    const U upper = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return narrowed((x == x) ? upper : U{} + 0x7fc0u);
  }
};

struct Float16 {
  static constexpr int64_t kBytes = 2;
#if defined(__AVX512F__)
  static DMDR_INLINE F load(const char *p) {
    return (F)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  }
  static DMDR_INLINE H rounded(F x) {
    return (H)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  }
#elif defined(__F16C__)
  static DMDR_INLINE F load(const char *p) {
    return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  }
  static DMDR_INLINE H rounded(F x) { return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
  static DMDR_INLINE F load(const char *p) {
    H x;
    std::memcpy(&x, p, sizeof x);
    const U h = widened(x);
    const U magnitude = (h & 0x7fffu) << 13;
    // Exponent rebias; subnormals by a subtraction that is exact (2^-14 (1 + m) - 2^-14), inf and NaN keep 255.
    const F normal = from_bits(magnitude + ((127u - 15u) << 23));
    const F subnormal = from_bits(magnitude + (113u << 23)) - from_bits(U{} + (113u << 23));
    const F special = from_bits(magnitude | (255u << 23));
    const U exponent = h & 0x7c00u;
    const F finite = (exponent == 0u) ? subnormal : normal;
    return from_bits(bits((exponent == 0x7c00u) ? special : finite) | ((h & 0x8000u) << 16));
  }
  static DMDR_INLINE H rounded(F x) {
    const U u = bits(x) & 0x7fffffffu;
    const U sign = (bits(x) >> 16) & 0x8000u;
    // Adding 0.5 leaves the half's subnormal, rounded to nearest even, in the low bits.
    const U subnormal = bits(from_bits(u) + 0.5f) - (126u << 23);
    const U normal = (u - ((127u - 15u) << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    U h = (u < (113u << 23)) ? subnormal : normal;
    h = (u >= (143u << 23)) ? U{} + 0x7c00u : h;  // 65536 and more; 65520 carries into the exponent by itself
    h = (u > (255u << 23)) ? U{} + 0x7e00u : h;
    return narrowed(h | sign);
  }
#endif
};

// Where a vector lies: a whole one at `at`, or the first `count` lanes of one.
struct Whole {
  int64_t at;
};
struct Tail {
  int64_t at;
  int count;
};

DMDR_INLINE Whole moved(Whole where, int64_t by) { return {where.at + by}; }
DMDR_INLINE Tail moved(Tail where, int64_t by) { return {where.at + by, where.count}; }

template <class Type>
DMDR_INLINE F read(const char *base, Whole where) {
  return Type::load(base + where.at * Type::kBytes);
}
template <class Type>
DMDR_INLINE F read(const char *base, Tail where) {
  char buffer[kLanes * 4] = {};
  std::memcpy(buffer, base + where.at * Type::kBytes, where.count * Type::kBytes);
  return Type::load(buffer);
}
template <class Type>
DMDR_INLINE void write(char *base, Whole where, F x) {
  const auto value = Type::rounded(x);
  std::memcpy(base + where.at * Type::kBytes, &value, sizeof value);
}
template <class Type>
DMDR_INLINE void write(char *base, Tail where, F x) {
  const auto value = Type::rounded(x);
  std::memcpy(base + where.at * Type::kBytes, &value, where.count * Type::kBytes);
}

// A vector past the caches, to an address that is a multiple of its size.
template <class Vector>
DMDR_INLINE void stream(char *p, Vector x) {
#if defined(__AVX512F__)
  if constexpr (sizeof x == 64) return _mm512_stream_si512(reinterpret_cast<__m512i *>(p), (__m512i)x);
#endif
#if defined(__AVX__)
  if constexpr (sizeof x == 32) return _mm256_stream_si256(reinterpret_cast<__m256i *>(p), (__m256i)x);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof x == 16) return _mm_stream_si128(reinterpret_cast<__m128i *>(p), (__m128i)x);
  if constexpr (sizeof x == 8) return _mm_stream_si64(reinterpret_cast<long long *>(p), (long long)x);
#endif
  std::memcpy(p, &x, sizeof x);
}

// What a prefetched line is for: to be read again later, or not, so that it need not push out one that is.
enum Use { kOnce = 0, kAgain = 3 };
constexpr int64_t kLine = 64, kAhead = 2048;  // bytes

// A row of a tensor: `offset` elements from its start, contiguous from there.
template <class Type>
struct Row {
  char *base;
  DMDR_INLINE Row(const dmdr_tensor &tensor, int64_t offset)
      : base(static_cast<char *>(tensor.data) + offset * Type::kBytes) {}
  template <class Where>
  DMDR_INLINE F load(Where where) const {
    return read<Type>(base, where);
  }
  template <class Where>
  DMDR_INLINE void store(Where where, F x) const {
    write<Type>(base, where, x);
  }
  // Asks for what lies kAhead behind `where`, once a line: for loops over several rows, where what the hardware prefetches
  // by itself begins again with every page of 4 KiB.
  template <Use use, class Where>
  DMDR_INLINE void prefetch(Where where) const {
    const int64_t at = where.at * Type::kBytes;
    if (at % kLine < kLanes * Type::kBytes) __builtin_prefetch(base + at + kAhead, 0, use);
  }
};

// The element type of an op whose tensors differ: each row looks its own up at every vector, one predicted branch.
struct Mixed {
  static constexpr bool kIsBfloat16 = false;
};

template <>
struct Row<Mixed> {
  char *base;
  int64_t dtype;
  DMDR_INLINE Row(const dmdr_tensor &tensor, int64_t offset)
      : base(static_cast<char *>(tensor.data) + offset * (tensor.dtype == DMDR_F32 ? 4 : 2)), dtype(tensor.dtype) {}
  template <class Where>
  DMDR_INLINE F load(Where where) const {
    if (dtype == DMDR_F32) return read<Float32>(base, where);
    return dtype == DMDR_BF16 ? read<Bfloat16>(base, where) : read<Float16>(base, where);
  }
  template <class Where>
  DMDR_INLINE void store(Where where, F x) const {
    if (dtype == DMDR_F32) return write<Float32>(base, where, x);
    if (dtype == DMDR_BF16) return write<Bfloat16>(base, where, x);
    write<Float16>(base, where, x);
  }
  template <Use, class Where>
  DMDR_INLINE void prefetch(Where) const {}
};

// An output that is written once, a vector after the other, and not read back by the op. From kPastCaches bytes on it
// goes past the caches: a store that misses reads its line first, a third of the traffic of a scaled copy, and what is
// kept of the line pushes out an input. Below, whoever reads the output next may still find it in a cache: a scaled copy
// of 8 MiB that fits takes 0.26 ms, and 0.50 ms past the cache (Zen 4, 32 MiB of L3). kPastOwnInputs is for an op that
// reads several times what it writes: its inputs have pushed the output's old lines out of the cache much earlier.
// for_items() makes such stores visible.
constexpr int64_t kPastCaches = 16 << 20, kPastOwnInputs = 4 << 20;

template <class Type>
struct Output : Row<Type> {
  uintptr_t not_streamed;  // no bit of these in an address: then it is streamed to
  DMDR_INLINE Output(const dmdr_tensor &tensor, int64_t offset, int64_t elements, int64_t past = kPastCaches)
      : Row<Type>(tensor, offset),
        not_streamed(elements * Type::kBytes < past ? ~uintptr_t{0} : kLanes * Type::kBytes - 1) {}
  DMDR_INLINE void store(Whole where, F x) const {
    char *const p = this->base + where.at * Type::kBytes;
    if ((reinterpret_cast<uintptr_t>(p) & not_streamed) == 0)
      stream(p, Type::rounded(x));
    else
      write<Type>(this->base, where, x);
  }
  DMDR_INLINE void store(Tail where, F x) const { write<Type>(this->base, where, x); }
};

template <>
struct Output<Mixed> : Row<Mixed> {
  DMDR_INLINE Output(const dmdr_tensor &tensor, int64_t offset, int64_t, int64_t = 0) : Row<Mixed>(tensor, offset) {}
};

// run(Type{}) with the element type that all the present tensors share, or with Mixed{}.
template <class Run>
inline void with_common_type(std::initializer_list<const dmdr_tensor *> tensors, Run run) {
  int64_t common = -1;
  bool same = true;
  for (const dmdr_tensor *tensor : tensors) {
    if (tensor->data == nullptr) continue;
    same = same && (common == -1 || common == tensor->dtype);
    common = tensor->dtype;
  }
  if (same && common == DMDR_F32) return run(Float32{});
  if (same && common == DMDR_BF16) return run(Bfloat16{});
  run(Mixed{});
}

// The lanes that count, for sums: all of a whole vector, zero past a tail's end (whatever was computed there).
DMDR_INLINE F counted(Whole, F x) { return x; }
DMDR_INLINE F counted(Tail where, F x) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (lane >= where.count) x[lane] = 0.f;
  return x;
}

// body(Whole{i}) for every full vector of [first, first + count), then body(Tail) for the rest.
template <class Body>
DMDR_INLINE void for_vectors(int64_t first, int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(Whole{first + i});
  if (i < count) body(Tail{first + i, static_cast<int>(count - i)});
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr
