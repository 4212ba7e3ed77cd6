// The formulas of dmd_gradient on single numbers.
//
//   x0_hat(p) = keep x_t + gain p;  g = weight gain (fake - real) / norm;  norm = mean |x0 - x0_hat(real)|
//
// g is a difference of predictions: x0 and x_t cancel in x0_hat(fake) - x0_hat(real) and are read for the norm only.
#pragma once

#include "device.cuh"
#include "dmdr/abi.h"

namespace dmdr {

using DmdArgs = dmdr_dmd_gradient_args;

struct Denoiser {
  float keep, gain;

  DMDR_DEVICE Denoiser(const DmdArgs &args, int64_t b) : keep(0.f), gain(1.f) {
    const float sigma = args.sigma[b];
    const float alpha = args.alpha != nullptr ? args.alpha[b] : 1.f - sigma;
    if (args.prediction == DMDR_FLOW) {
      keep = 1.f;
      gain = -sigma;
    } else if (args.prediction == DMDR_EPS) {
      keep = 1.f / alpha;
      gain = -sigma / alpha;
    } else if (args.prediction == DMDR_V) {
      keep = alpha;
      gain = -sigma;
    }
  }
  // x0 and x_t are close at small sigma: their difference first, it is exact there.
  DMDR_DEVICE float distance(float x0, float x_t, float real) const { return fabsf((x0 - keep * x_t) - gain * real); }
};

// What the elements that the mask selects say about a part of a sample.
struct Measured {
  double distance, count;  // sum |x0 - x0_hat(real)|, how many
  uint32_t largest;        // the bits of max |fake - real|; as integers, a NaN is larger than all numbers
  uint32_t unused;
};

struct MergeMeasured {
  DMDR_DEVICE Measured operator()(const Measured &a, const Measured &b) const {
    return {a.distance + b.distance, a.count + b.count, a.largest > b.largest ? a.largest : b.largest, 0};
  }
};

DMDR_DEVICE float normalizer(const DmdArgs &args, const Measured &over) {
  if (args.normalizer == DMDR_NO_NORMALIZER) return 1.f;
  const float mean = static_cast<float>(over.distance / (over.count < 1. ? 1. : over.count));
  const float eps = static_cast<float>(args.eps);
  if (args.eps_mode == DMDR_EPS_ADD) return mean + eps;
  return args.eps_mode == DMDR_EPS_CLAMP && mean < eps ? eps : mean;
}

// weight gain / norm (fake - real). One factor per sample, unless it leaves fp32's normal range although its parts
// do not: then in the formula's order, where 0 / norm stays 0 and a tiny norm does not overflow by itself.
struct Scaling {
  float gain, norm, weight, factor;
  bool folds;

  DMDR_DEVICE Scaling(const DmdArgs &args, int64_t b, float gain, float norm)
      : gain(gain), norm(norm), weight(args.weight != nullptr ? args.weight[b] : 1.f), factor(weight * (gain / norm)),
        folds(is_normal(factor) && is_normal(gain / norm)) {}
  DMDR_DEVICE float of(float difference) const {
    return folds ? factor * difference : weight * (gain * difference / norm);
  }
  template <int kCount>
  DMDR_DEVICE void apply(float (&x)[kCount]) const {
    if (folds) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] *= factor;
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = weight * (gain * x[j] / norm);
    }
  }

 private:
  static DMDR_DEVICE bool is_normal(float x) { return fabsf(x) >= 0x1p-126f && fabsf(x) <= 0x1.fffffep127f; }
};

// What happens to values that are not finite in grad's dtype.
struct NanPolicy {
  float overflow, largest;  // magnitudes from `overflow` on round to an infinity; the largest number
  bool keeps, saturates, drops;

  DMDR_DEVICE explicit NanPolicy(const DmdArgs &args)
      : overflow(bits_float(0x7f800000u)), largest(0x1.fffffep127f), keeps(args.nan_policy == DMDR_NAN_KEEP),
        saturates(args.nan_policy == DMDR_NAN_TORCH), drops(false) {
    if (args.grad.dtype == DMDR_BF16) {
      overflow = 0x1.ffp127f;
      largest = 0x1.fep127f;
    } else if (args.grad.dtype == DMDR_F16) {
      overflow = 65520.f;
      largest = 65504.f;
    }
  }
  // zero_sample: |g| grows with |fake - real|, so the sample's largest difference decides before any g is written.
  DMDR_DEVICE void look_at(const DmdArgs &args, const Scaling &scaling, const Measured &sample) {
    drops = args.nan_policy == DMDR_NAN_ZERO_SAMPLE && !(fabsf(scaling.of(bits_float(sample.largest))) < overflow);
  }
  template <int kCount>
  DMDR_DEVICE void apply(float (&g)[kCount]) const {
    if (keeps) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float replaced = saturates && g[j] == g[j] ? copysignf(largest, g[j]) : 0.f;
      g[j] = fabsf(g[j]) < overflow && !drops ? g[j] : replaced;
    }
  }
};

}  // namespace dmdr
