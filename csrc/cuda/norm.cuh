// Rows [batch, rows, features] of layer_norm_modulate, each held in the registers of one or more warps.
#pragma once

#include "launch.h"
#include "reduce.cuh"

namespace dmdr {

struct NormParams {
  dmdr_layer_norm_modulate_args args;
  uint32_t rows, features;                    // rows per sample
  uint32_t block_rows, blocks_per_sample;     // backward: rows that a block adds up
  bool aligned;
};

// The widest row: 128 threads with 64 columns each, in the backward 512 with 16.
constexpr int64_t kMostFeatures = 8192;

DMDR_DEVICE int64_t row_offset(const dmdr_tensor &tensor, uint32_t sample, uint32_t row) {
  return sample * tensor.stride[0] + row * tensor.stride[1];
}

// The columns of a row that thread `lane` of kThreads holds: kVectors vectors, kThreads apart.
template <class Type, int kThreads, int kColumns>
struct RowShare {
  static constexpr int kVectors = kColumns / Type::kWidth;
  uint32_t features, lane;
  bool aligned;

  DMDR_DEVICE uint32_t column(int vector) const { return (vector * kThreads + lane) * Type::kWidth; }
  DMDR_DEVICE bool has(int vector) const { return column(vector) < features; }
  DMDR_DEVICE Extent extent(int vector) const {
    if (Type::kFixed) return {Type::kWidth, true};
    const uint32_t left = features - column(vector);
    return {left < Type::kWidth ? static_cast<int>(left) : Type::kWidth, aligned};
  }
  DMDR_DEVICE Vector<Type> load(const dmdr_tensor &tensor, int64_t row, int vector) const {
    return Vector<Type>::load(tensor, row + column(vector), extent(vector));
  }
  DMDR_DEVICE void store(const dmdr_tensor &tensor, int64_t row, int vector, const float (&x)[Type::kWidth]) const {
    Vector<Type>::store(tensor, row + column(vector), x, extent(vector));
  }
  // Of the vector's elements only those inside the row.
  DMDR_DEVICE bool inside(int vector, int j) const { return Type::kFixed || column(vector) + j < features; }
};

// fn(Type(), params) for tensors [batch, rows, features].
template <class Fn>
int with_rows(const dmdr_layer_norm_modulate_args &args, std::initializer_list<const dmdr_tensor *> tensors, Fn fn) {
  if (!known_dtypes(tensors)) return DMDR_ERROR_DTYPE;
  const int64_t batch = args.shape[0], rows = args.shape[1], features = args.shape[DMDR_OUTER];
  if (batch < 0 || rows < 0 || features < 0 || features > kMostFeatures || batch * rows > INT32_MAX)
    return DMDR_ERROR_ARGUMENT;
  if (batch * rows * features == 0) return DMDR_OK;
  NormParams params = {};
  params.args = args;
  params.rows = static_cast<uint32_t>(rows);
  params.features = static_cast<uint32_t>(features);
  params.aligned = all_aligned(tensors, args.shape, 2);
  const int64_t dtype = common_dtype(tensors);
  const int64_t width = dtype == DMDR_F32 ? Float32::kWidth : Bfloat16::kWidth;
  return with_type(dtype, params.aligned && features % width == 0, [&](auto type) { return fn(type, params); });
}

}  // namespace dmdr
