// Sizes that the resizing kernel and its callers agree on. Internal linkage: nothing here may be merged between the
// instruction-set levels.
#pragma once

#include <cstdint>

namespace dmdr {

// Rows of scratch are a multiple of so many floats, and so many rows are worked on together: the widest vector.
constexpr int64_t kResizePad = 16;
static inline int64_t resize_padded(int64_t size) { return (size + kResizePad - 1) / kResizePad * kResizePad; }

// How many inputs one output's filter covers at most.
static inline int64_t filter_width(int64_t size_in, int64_t size_out, bool antialias) {
  if (!antialias) return 4;
  const float scale = static_cast<float>(size_in) / static_cast<float>(size_out);
  const float support = scale >= 1.f ? 2.f * scale : 2.f;
  return static_cast<int64_t>(__builtin_ceilf(support)) * 2 + 1;
}

// How many outputs' filters cover one input at most.
static inline int64_t transposed_width(int64_t size_in, int64_t size_out, bool antialias) {
  const double scale = static_cast<double>(size_in) / static_cast<double>(size_out);
  const double reach = antialias && scale >= 1. ? 2. * scale : 2.;
  const int64_t width = static_cast<int64_t>(__builtin_ceil((2. * reach + 1.) / scale)) + 2;
  return width < size_out ? width : size_out;
}

// A banded matrix in eight-byte words: first and count of each row, then its floats.
static inline int64_t band_words(int64_t rows, int64_t width) { return 2 * rows + (rows * width + 1) / 2; }

static inline int64_t resize_scratch(int64_t width, int64_t out_height, int64_t out_width) {
  const int64_t row = resize_padded(width), out_row = resize_padded(out_width);
  const int64_t forward = kResizePad * 2 * (row + out_row);
  const int64_t backward = kResizePad * (row + 2 * out_row) + (out_height + kResizePad) * row;
  return forward > backward ? forward : backward;
}

}  // namespace dmdr
