// Bicubic resizing of one dimension as a banded matrix, in PyTorch's own order of fp32 operations: another order moves
// a filter's centre by an ulp of the image size and its weights by 1e-5.
#pragma once

#include "lanes.h"
#include "resize_space.h"

namespace dmdr {
namespace DMDR_LEVEL {

// Row i of the matrix: entries first[i] .. first[i] + count[i] - 1, at weight + i * width.
struct Band {
  int64_t rows, width;
  int64_t *first, *count;
  float *weight;
};

// Keys' cubic: |x| < 1 and 1 <= |x| < 2, a = -0.5 with antialiasing and -0.75 without, as in PyTorch.
inline float near_cubic(float x, float a) { return ((a + 2.f) * x - (a + 3.f)) * x * x + 1.f; }
inline float far_cubic(float x, float a) { return ((a * x - 5.f * a) * x + 8.f * a) * x - 4.f * a; }
inline float cubic(float x) {
  x = __builtin_fabsf(x);
  return x < 1.f ? near_cubic(x, -0.5f) : x < 2.f ? far_cubic(x, -0.5f) : 0.f;
}

inline void antialiased_row(int64_t i, int64_t size_in, int64_t size_out, const Band &band) {
  const float scale = static_cast<float>(size_in) / size_out;
  const float support = scale >= 1.f ? 2.f * scale : 2.f;
  const float inverse = scale >= 1.f ? static_cast<float>(1. / scale) : 1.f;
  const float centre = static_cast<float>(scale * (i + 0.5));
  const int64_t low = static_cast<int64_t>((centre - support) + 0.5);
  const int64_t high = static_cast<int64_t>((centre + support) + 0.5);
  const int64_t first = low > 0 ? low : 0, last = high < size_in ? high : size_in;
  const int64_t count = last - first < band.width ? last - first : band.width;
  float *const weight = band.weight + i * band.width;
  float total = 0.f;
  for (int64_t j = 0; j < count; ++j) {
    weight[j] = cubic(static_cast<float>(((static_cast<float>(j + first) - centre) + 0.5) * inverse));
    total += weight[j];
  }
  for (int64_t j = 0; j < count; ++j)
    if (total != 0.f) weight[j] /= total;
  band.first[i] = first;
  band.count[i] = count;
}

// Four taps around the source position; those beyond the border fall on its pixel.
inline void plain_row(int64_t i, int64_t size_in, int64_t size_out, const Band &band) {
  const float scale = static_cast<float>(size_in) / size_out;
  const float source = scale * (static_cast<float>(i) + 0.5f) - 0.5f;
  int64_t index = static_cast<int64_t>(__builtin_floorf(source));
  index = index < size_in - 1 ? index : size_in - 1;
  float t = source - static_cast<float>(index);
  t = t < 0.f ? 0.f : t > 1.f ? 1.f : t;
  const float tap[4] = {far_cubic(t + 1.f, -0.75f), near_cubic(t, -0.75f), near_cubic(1.f - t, -0.75f),
                        far_cubic((1.f - t) + 1.f, -0.75f)};
  const auto inside = [size_in](int64_t x) { return x < 0 ? 0 : x < size_in ? x : size_in - 1; };
  const int64_t first = inside(index - 1), last = inside(index + 2);
  float *const weight = band.weight + i * band.width;
  for (int64_t j = 0; j < 4; ++j) weight[j] = 0.f;
  for (int64_t j = 0; j < 4; ++j) weight[inside(index - 1 + j) - first] += tap[j];
  band.first[i] = first;
  band.count[i] = last - first + 1;
}

inline void fill_band(int64_t size_in, int64_t size_out, bool antialias, const Band &band) {
  for (int64_t i = 0; i < size_out; ++i)
    antialias ? antialiased_row(i, size_in, size_out, band) : plain_row(i, size_in, size_out, band);
}

// Row y of `back` lists the rows of `band` that cover y: a contiguous range, since filters move with their row.
inline void transpose_band(const Band &band, const Band &back) {
  for (int64_t y = 0, begin = 0; y < back.rows; ++y) {
    while (begin < band.rows && band.first[begin] + band.count[begin] <= y) ++begin;
    int64_t end = begin;
    for (; end < band.rows && band.first[end] <= y; ++end) {
      const int64_t j = y - band.first[end];
      back.weight[y * back.width + end - begin] = j < band.count[end] ? band.weight[end * band.width + j] : 0.f;
    }
    back.first[y] = begin;
    back.count[y] = end - begin;
  }
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr
