// Philox4x32-10 and the normals drawn from it: the stream of every backend.
//
//   key = (lo32, hi32 of seed[0]);  counter = (lo32, hi32 of block, lo32, hi32 of seed[1]);  block = i / 4
//   words r0..r3; (a, b) = (r0, r1) for lanes i % 4 in {0, 1}, (r2, r3) for {2, 3}
//   u = ((a >> 8) + 1) 2^-24, turns = (b >> 8) 2^-24;  z = sqrt(-2 ln u) cos(2 pi turns) on even lanes, sin on odd
// Multiply-adds are spelled out, so that the arithmetic is the same on any machine.
//
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include "device.cuh"

namespace dmdr {

struct Stream {
  uint32_t key0, key1, stream0, stream1;
  explicit DMDR_DEVICE Stream(const int64_t *seed)
      : key0(static_cast<uint32_t>(seed[0])), key1(static_cast<uint32_t>(static_cast<uint64_t>(seed[0]) >> 32)),
        stream0(static_cast<uint32_t>(seed[1])), stream1(static_cast<uint32_t>(static_cast<uint64_t>(seed[1]) >> 32)) {}
};

struct Words {
  uint32_t r0, r1, r2, r3;
};

DMDR_DEVICE Words philox(const Stream &stream, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = stream.stream0, c3 = stream.stream1, k0 = stream.key0, k1 = stream.key1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = wide_product(c0, 0xD2511F53u), p1 = wide_product(c2, 0xCD9E8D57u);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// sqrt(-ln u) for u = ((a >> 8) + 1) 2^-24: 24 bits, so u = 1 gives 0 exactly and the next value is right to 1e-7.
// The approximate lg2 instruction is not: its absolute error of 2^-22 is all there is near u = 1. With an exactly
// rounded root all normals are within 8.2e-7 of float64; the device's root is within 2^-23 of that.
DMDR_DEVICE float box_muller_radius(uint32_t a) {
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = f - f^2/2 + f^3 P(f), f = m - 1 exact. Fit: 3.2e-8 relative.
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u, kTwoTo24 = 24u << 23;
  const uint32_t shifted = float_bits(static_cast<float>((a >> 8) + 1u)) - (kSqrtHalf + kTwoTo24);
  const float exponent = static_cast<float>(static_cast<int32_t>(shifted & 0xff800000u));  // e 2^23
  const float f = bits_float((shifted & 0x007fffffu) + kSqrtHalf) - 1.f;
  float p = fmaf(0.08700437932659501f, f, -0.1426749023121867f);
  p = fmaf(p, f, 0.14914768633640627f);
  p = fmaf(p, f, -0.16577584331163742f);
  p = fmaf(p, f, 0.19963063709068254f);
  p = fmaf(p, f, -0.2500133704603735f);
  p = fmaf(p, f, 0.33333910739315853f);
  const float log = fmaf(fmaf(p, f, -0.5f), f * f, f);
  return fast_sqrt(-fmaf(exponent, 0.6931471805599453f * 0x1p-23f, log));
}

struct Rotation {
  float cos, sin;
};

// sqrt(2) (cos, sin) of 2 pi (b >> 8) 2^-24. The angle is half turns h + 1/2 + x with the bit h and an exact x in
// [-1/2, 1/2), so both signs are h's and no sine has to change places with a cosine. Fits: 5e-9 and 3e-10.
DMDR_DEVICE Rotation box_muller_angle(uint32_t b) {
  const float x = bits_float(((b >> 8) & 0x007fffffu) | 0x3f800000u) - 1.5f, z = x * x;
  float s = fmaf(-0.10968675343109215f, z, 0.8460420319020899f);
  s = fmaf(s, z, -3.606343176538449f);
  s = fmaf(s, z, 7.3082451217693265f);
  // The largest term apart and rounded once: the sum below loses half of what s x would.
  s = fmaf(x, -4.442882914536153f, fmaf(s, z, 1.0014280249492913e-07f) * x);  // -sqrt(2) sin(pi x)
  float c = fmaf(-0.034536053253843464f, z, 0.33227501082020494f);
  c = fmaf(c, z, -1.8882807209864592f);
  c = fmaf(c, z, 5.739882161482291f);
  c = fmaf(c, z, -6.9788641367622f);
  c = fmaf(c, z, 1.4142135623730951f);  // sqrt(2) cos(pi x)
  const uint32_t sign = b & 0x80000000u;
  return {bits_float(float_bits(s) ^ sign), bits_float(float_bits(c) ^ sign)};
}

// The four normals of a block.
DMDR_DEVICE void draw_block(const Stream &stream, uint64_t block, float *normal) {
  const Words words = philox(stream, block);
  const float first = box_muller_radius(words.r0), second = box_muller_radius(words.r2);
  const Rotation at_first = box_muller_angle(words.r1), at_second = box_muller_angle(words.r3);
  normal[0] = first * at_first.cos;
  normal[1] = first * at_first.sin;
  normal[2] = second * at_second.cos;
  normal[3] = second * at_second.sin;
}

// Normals element .. element + kCount - 1 of the stream.
template <int kCount>
DMDR_DEVICE void draw(const Stream &stream, uint64_t element, float (&normal)[kCount]) {
  static_assert(kCount % 4 == 0, "whole blocks");
  float last[4];
  const uint32_t skip = static_cast<uint32_t>(element % 4);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) draw_block(stream, element / 4 + i / 4, normal + i);
  if (skip == 0) return;
  // Elements that start inside a block: one block more, everything moved down.
  draw_block(stream, element / 4 + kCount / 4, last);
  for (uint32_t moved = 0; moved < skip; ++moved) {
#pragma unroll
    for (int i = 0; i + 1 < kCount; ++i) normal[i] = normal[i + 1];
    normal[kCount - 1] = last[0];
    last[0] = last[1];
    last[1] = last[2];
    last[2] = last[3];
  }
}

}  // namespace dmdr
