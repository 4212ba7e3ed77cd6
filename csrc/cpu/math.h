// Elementary functions on vectors: branch-free polynomials in fp32, NaN in gives NaN out.
// The coefficients are minimax fits in the relative error; the bound beside each is the fit's, before rounding.
#pragma once

#include "lanes.h"

namespace dmdr {
namespace DMDR_LEVEL {

// ln(u) for normal u > 0, within 1 ulp also next to u = 1, where Box-Muller's radius goes to 0.
DMDR_INLINE F log(F u) {
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = f - f^2/2 + f^3 P(f), f = m - 1 exact. Fit: 7.5e-10.
  const I shifted = (I)bits(u) - 0x3f3504f3;
  const I exponent = shifted >> 23;
  const F f = from_bits((U)((shifted & 0x007fffff) + 0x3f3504f3)) - 1.f;
  const F e = __builtin_convertvector(exponent, F);
  F p = splat(0.06746601328602032f);
  p = p * f - 0.1167564130422026f;
  p = p * f + 0.118881745982986f;
  p = p * f - 0.12405591416916675f;
  p = p * f + 0.1421955090820904f;
  p = p * f - 0.16667995667109958f;
  p = p * f + 0.20002118732204724f;
  p = p * f - 0.25000009603653944f;
  p = p * f + 0.3333331260280281f;
  const F square = f * f;
  // ln 2 in two parts: the first has 9 trailing zeros, so e * high is exact.
  F low = f * square * p + e * -2.12194440e-4f;
  low = low - 0.5f * square;
  return (f + low) + e * 0.693359375f;
}

struct SinCos {
  F sin, cos;
};

// sin and cos of 2 pi turns for turns in [0, 1): the reduction to an eighth of a turn is exact. Fit: 5e-12.
DMDR_INLINE SinCos sincos_turns(F turns) {
  const I quadrant = __builtin_convertvector(turns * 4.f + 0.5f, I);
  const F r = turns - __builtin_convertvector(quadrant, F) * 0.25f;
  const F z = r * r;
  F s = splat(41.47294839131306f);
  s = s * z - 76.6978699483178f;
  s = s * z + 81.60520474616648f;
  s = s * z - 41.34170215350444f;
  // 2 pi = 6.28125 + 0.0019353...: r * 6.28125 loses less than r * fl(2 pi).
  s = r * (s * z + 0.00193530715245f) + r * 6.28125f;
  F c = splat(-26.11926458519596f);
  c = c * z + 60.24045240162107f;
  c = c * z - 85.45679385536287f;
  c = c * z + 64.93939397709343f;
  c = c * z - 19.739208802164484f;
  c = c * z + 1.f;
  const I odd = (quadrant & 1) != 0;
  const U sin_sign = (U)(quadrant & 2) << 30;
  const U cos_sign = (U)((quadrant + 1) & 2) << 30;
  return {from_bits(bits(select(odd, c, s)) ^ sin_sign), from_bits(bits(select(odd, s, c)) ^ cos_sign)};
}

// e^x, within 2 ulp; overflows to infinity and underflows to 0 through the subnormals.
DMDR_INLINE F exp(F x) {
  x = select(x > 104.f, splat(104.f), x);
  x = select(x < -104.f, splat(-104.f), x);
  // x = n ln 2 + r; adding 1.5 2^23 rounds n to an integer. e^r = 1 + r + r^2 P(r), |r| <= ln 2 / 2. Fit: 3.1e-9.
  const F n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = splat(0.00139504768181617f);
  p = p * r + 0.008368882433880766f;
  p = p * r + 0.041666206013902016f;
  p = p * r + 0.16666518896664115f;
  p = p * r + 0.5000000095121935f;
  p = p * (r * r) + r + 1.f;
  // 2^n as two factors, each in range for n in [-151, 151].
  const I power = __builtin_convertvector(select(n == n, n, F{}), I), half = power >> 1;
  return p * from_bits((U)((half + 127) << 23)) * from_bits((U)((power - half + 127) << 23));
}

struct Sigmoid {
  F value, rest;  // rest = 1 - value, without the cancellation
};

DMDR_INLINE Sigmoid sigmoid(F x) {
  const F small = exp(-abs(x)), large = 1.f / (1.f + small);
  return {select(x < 0.f, small * large, large), select(x < 0.f, large, small * large)};
}

struct Normal {
  F cdf, density;
};

// The standard normal distribution: cdf(x) = e^(-x^2/2) R(|x|) for x < 0 and 1 - that for x > 0, so its tail keeps its
// relative accuracy; R is a polynomial in w = 1 / (1 + 0.35 |x|). Fit: 3.2e-8.
DMDR_INLINE Normal normal(F x) {
  const F t = abs(x), w = 1.f / (1.f + 0.35f * t), bell = exp(-0.5f * x * x);
  F r = splat(-0.029158224067432587f);
  r = r * w + 0.14403253791652731f;
  r = r * w - 0.25584227912791196f;
  r = r * w + 0.15932335404427928f;
  r = r * w - 0.023214790400393502f;
  r = r * w + 0.10555349699989097f;
  r = r * w + 0.11982104641601983f;
  r = r * w + 0.13986354710730842f;
  r = r * w + 0.13962130512409493f;
  const F tail = bell * (r * w);
  return {select(x < 0.f, tail, 1.f - tail), bell * 0.3989422804014327f};
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr
