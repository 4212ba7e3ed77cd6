// Bicubic resizing of one dimension, with weights in PyTorch's own order of fp32 operations: another order moves a
// filter's centre by an ulp of the image size and its weights by 1e-5.
#pragma once

#include "launch.h"

namespace dmdr {

struct Resize {
  int size_in, size_out;
  float scale, support, inverse;
  bool antialias;

  Resize(int64_t in, int64_t out, bool antialias)
      : size_in(static_cast<int>(in)), size_out(static_cast<int>(out)),
        scale(static_cast<float>(in) / static_cast<float>(out)), support(antialias && scale >= 1.f ? 2.f * scale : 2.f),
        inverse(antialias && scale >= 1.f ? static_cast<float>(1. / scale) : 1.f), antialias(antialias) {}

  // How many inputs a filter covers at most, how many inputs `outputs` neighbouring filters cover, and how many outputs
  // have a filter that covers one of `inputs` neighbouring inputs.
  int most_taps() const { return antialias ? 2 * static_cast<int>(ceilf(support)) + 1 : 4; }
  int most_inputs(int outputs) const { return static_cast<int>((outputs - 1) * scale + 2.f * support) + 3; }
  int most_outputs(int inputs) const { return static_cast<int>((inputs - 1 + 2.f * support) / scale) + 2; }
};

// Keys' cubic: |x| < 1 and 1 <= |x| < 2, a = -0.5 with antialiasing and -0.75 without, as in PyTorch.
DMDR_DEVICE float near_cubic(float x, float a) { return ((a + 2.f) * x - (a + 3.f)) * x * x + 1.f; }
DMDR_DEVICE float far_cubic(float x, float a) { return ((a * x - 5.f * a) * x + 8.f * a) * x - 4.f * a; }

// The inputs [first, end) of one output's filter.
struct Window {
  int first, end;
};

class Filter {
 public:
  DMDR_DEVICE Filter(const Resize &resize, int output) : resize_(resize) {
    const float middle = static_cast<float>(output) + 0.5f;
    if (resize.antialias) {
      centre_ = exact_product(resize.scale, middle);
      const int low = static_cast<int>(static_cast<double>(exact_sum(centre_, -resize.support)) + 0.5);
      const int high = static_cast<int>(static_cast<double>(exact_sum(centre_, resize.support)) + 0.5);
      window_ = {low > 0 ? low : 0, high < resize.size_in ? high : resize.size_in};
      if (window_.end > window_.first + most_taps()) window_.end = window_.first + most_taps();
    } else {
      const float source = exact_sum(exact_product(resize.scale, middle), -0.5f);
      index_ = static_cast<int>(floorf(source));
      index_ = index_ < resize.size_in - 1 ? index_ : resize.size_in - 1;
      centre_ = source - static_cast<float>(index_);
      centre_ = centre_ < 0.f ? 0.f : centre_ > 1.f ? 1.f : centre_;
      window_ = {bounded(index_ - 1), bounded(index_ + 2) + 1};
    }
  }
  DMDR_DEVICE Window window() const { return window_; }

  // The weight of an input of the window, before normalisation.
  DMDR_DEVICE float raw(int input) const {
    if (!resize_.antialias) return plain(input);
    const float apart = exact_sum(static_cast<float>(input), -centre_);
    const float x = fabsf(exact_product(exact_sum(apart, 0.5f), resize_.inverse));
    return x < 1.f ? near_cubic(x, -0.5f) : x < 2.f ? far_cubic(x, -0.5f) : 0.f;
  }
  // What the raw weights are divided by.
  DMDR_DEVICE float total() const {
    if (!resize_.antialias) return 1.f;
    float total = 0.f;
    for (int input = window_.first; input < window_.end; ++input) total += raw(input);
    return total != 0.f ? total : 1.f;
  }

 private:
  DMDR_DEVICE int most_taps() const { return 2 * static_cast<int>(ceilf(resize_.support)) + 1; }
  DMDR_DEVICE int bounded(int input) const {
    return input < 0 ? 0 : input < resize_.size_in ? input : resize_.size_in - 1;
  }
  // Four taps around the source position; those beyond the border fall on its pixel.
  DMDR_DEVICE float plain(int input) const {
    const float t = centre_, u = 1.f - centre_;
    float weight = bounded(index_ - 1) == input ? far_cubic(t + 1.f, -0.75f) : 0.f;
    weight += bounded(index_) == input ? near_cubic(t, -0.75f) : 0.f;
    weight += bounded(index_ + 1) == input ? near_cubic(u, -0.75f) : 0.f;
    return weight + (bounded(index_ + 2) == input ? far_cubic(u + 1.f, -0.75f) : 0.f);
  }

  const Resize &resize_;
  float centre_;  // antialias: the filter's middle; else the source position's fraction
  int index_ = 0;
  Window window_;
};

}  // namespace dmdr
