// The elements of a sample as vectors, each inside one contiguous row, and where a tensor has them.
#pragma once

#include "element.cuh"

namespace dmdr {

struct Layout {
  int64_t batch, sample;    // samples, and elements of one
  int64_t inner;            // elements of a row
  uint32_t vectors_per_row;
  uint32_t vectors;         // per sample
  uint32_t outer[DMDR_OUTER - 1];
  bool aligned;             // all addresses of whole vectors are multiples of 16 bytes

  // The i-th vector of a sample. Samples of a fixed type are contiguous: one row.
  template <class Type>
  DMDR_DEVICE auto place(uint32_t i) const;
};

struct FlatPlace {
  int64_t column;
  Extent extent;
  DMDR_DEVICE int64_t in_sample(const Layout &) const { return column; }
  DMDR_DEVICE int64_t offset(const dmdr_tensor &) const { return column; }
};

struct StridedPlace {
  uint32_t row, index[DMDR_OUTER - 1];
  int64_t column;
  Extent extent;
  DMDR_DEVICE int64_t in_sample(const Layout &layout) const { return row * layout.inner + column; }
  DMDR_DEVICE int64_t offset(const dmdr_tensor &tensor) const {
    int64_t elements = column;
#pragma unroll
    for (int dim = 0; dim < DMDR_OUTER - 1; ++dim) elements += index[dim] * tensor.stride[dim + 1];
    return elements;
  }
};

template <class Type>
DMDR_DEVICE auto Layout::place(uint32_t i) const {
  if constexpr (Type::kFixed) {
    return FlatPlace{static_cast<int64_t>(i) * Type::kWidth, {Type::kWidth, true}};
  } else {
    StridedPlace place;
    uint32_t row = i / vectors_per_row;
    place.row = row;
    place.column = static_cast<int64_t>(i - row * vectors_per_row) * Type::kWidth;
    const int64_t left = inner - place.column;
    place.extent = {left < Type::kWidth ? static_cast<int>(left) : Type::kWidth, aligned};
#pragma unroll
    for (int dim = DMDR_OUTER - 2; dim >= 0; --dim) {
      place.index[dim] = row % outer[dim];
      row /= outer[dim];
    }
    return place;
  }
}

// Sample b of a tensor, as a tensor.
DMDR_DEVICE dmdr_tensor sample_of(const dmdr_tensor &tensor, int64_t b) {
  const int bytes = tensor.dtype == DMDR_F32 ? 4 : 2;
  dmdr_tensor sample = tensor;
  if (tensor.data != nullptr) sample.data = static_cast<char *>(tensor.data) + b * tensor.stride[0] * bytes;
  return sample;
}

}  // namespace dmdr
