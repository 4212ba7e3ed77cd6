// What layer_norm_modulate and the gated residual ops share: sums over a row, the norm and its gradient, and sums over
// rows for the gradients of modulation vectors.
#pragma once

#include "lanes.h"
#include "parallel.h"

namespace dmdr {
namespace DMDR_LEVEL {

DMDR_INLINE int64_t at_row(const dmdr_tensor &tensor, int64_t sample, int64_t row) {
  return sample * tensor.stride[0] + row * tensor.stride[1];
}

struct TwoSums {
  float first, second;
};

// Sums over a row of the two vectors that body(where) gives: four accumulators each, so that an add need not wait for
// the one before, and a fixed order.
struct Pair {
  F first, second;
};
template <class Body>
DMDR_INLINE TwoSums sum_row(int64_t count, Body body) {
  Pair acc[4] = {};
  const auto add = [&](Pair &into, auto where) __attribute__((always_inline)) {
    const Pair value = body(where);
    into.first += counted(where, value.first);
    into.second += counted(where, value.second);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    add(acc[0], Whole{i});
    add(acc[1], Whole{i + kLanes});
    add(acc[2], Whole{i + 2 * kLanes});
    add(acc[3], Whole{i + 3 * kLanes});
  }
  for (; i + kLanes <= count; i += kLanes) add(acc[0], Whole{i});
  if (i < count) add(acc[1], Tail{i, static_cast<int>(count - i)});
  return {static_cast<float>(sum((acc[0].first + acc[1].first) + (acc[2].first + acc[3].first))),
          static_cast<float>(sum((acc[0].second + acc[1].second) + (acc[2].second + acc[3].second)))};
}

struct Moments {
  float mean, rstd;
};

// mean and 1 / sqrt(var + eps) of a row, the variance about the mean (no cancellation).
template <class Type>
DMDR_INLINE Moments moments(const Row<Type> &x, int64_t count, double eps) {
  const float mean = sum_row(count, [&](auto where) { return Pair{x.load(where), F{}}; }).first / count;
  const float var = sum_row(count, [&](auto where) {
                      const F apart = x.load(where) - mean;
                      return Pair{apart * apart, F{}};
                    }).first / count;
  return {mean, static_cast<float>(1. / __builtin_sqrt(static_cast<double>(var) + eps))};
}

// y = (x - mean) rstd (1 + scale) + shift
template <class Type>
DMDR_INLINE void modulate(const Row<Type> &x, Moments norm, const Row<Type> &shift, const Row<Type> &scale,
                          const Output<Type> &y, int64_t count) {
  for_vectors(0, count, [&](auto where) {
    const F normal = (x.load(where) - norm.mean) * norm.rstd;
    y.store(where, normal * (1.f + scale.load(where)) + shift.load(where));
  });
}

// How the gradients of a modulation vector [1|B, 1|T, D] gather over the rows b, t.
enum Gather { kNone = DMDR_GATHER_NONE, kPerRow = DMDR_GATHER_PER_ROW, kPerSample = DMDR_GATHER_SAMPLE };

// Sums over rows: a block is up to DMDR_NORM_BLOCK rows of one sample and keeps `sums` vectors of D floats in the
// workspace; gather() adds the blocks in order. With kPerRow a block is one row and nothing is added.
struct RowBlocks {
  int64_t batch, rows, per_sample;
  RowBlocks(const int64_t *shape)
      : batch(shape[0]), rows(shape[1]), per_sample((shape[1] + DMDR_NORM_BLOCK - 1) / DMDR_NORM_BLOCK) {}
  int64_t items() const { return batch * per_sample; }
  int64_t sample(int64_t item) const { return item / per_sample; }
  int64_t first(int64_t item) const { return item % per_sample * DMDR_NORM_BLOCK; }
  int64_t count(int64_t item) const {
    const int64_t left = rows - first(item);
    return left < DMDR_NORM_BLOCK ? left : DMDR_NORM_BLOCK;
  }
};

// A block's sum of one vector per row, or the rows themselves.
template <class Type>
struct VectorSum {
  int64_t gather;
  char *block;  // fp32, in the workspace
  DMDR_INLINE VectorSum(int64_t gather, float *block, int64_t count)
      : gather(gather), block(reinterpret_cast<char *>(block)) {
    if (gather > kPerRow) std::memset(block, 0, count * 4);
  }
  template <class Where>
  DMDR_INLINE void add(Where where, F value, const Row<Type> &row) const {
    if (gather == kPerRow)
      row.store(where, value);
    else if (gather != kNone)
      write<Float32>(block, where, read<Float32>(block, where) + value);
  }
};

// out[group][0..count) = sum over the group's blocks; `space` has `stride` floats per block and the vector starts at
// `at`. Groups are the samples, or all of them. Sixteen blocks at a time: of 256 in a row (a weight's gradient over 16384
// rows) the rounding errors were 2.2 times those of PyTorch's sum.
template <class Type>
void gather_blocks(const dmdr_tensor &out, int64_t gather, const RowBlocks &blocks, const float *space, int64_t stride,
                   int64_t at, int64_t count, int64_t num_threads) {
  if (gather <= kPerRow) return;
  const int64_t groups = gather == kPerSample ? blocks.batch : 1;
  const int64_t in_group = gather == kPerSample ? blocks.per_sample : blocks.items();
  constexpr int64_t kColumns = 256, kRunOfBlocks = 16;
  const int64_t pieces = (count + kColumns - 1) / kColumns;
  for_items(groups * pieces, groups * in_group * count, num_threads, [&](int64_t item) {
    const int64_t group = item / pieces, first = item % pieces * kColumns;
    const Row<Type> target(out, group * out.stride[0]);
    for_vectors(first, count - first < kColumns ? count - first : kColumns, [&](auto where) {
      F total = {};
      for (int64_t run = 0; run < in_group; run += kRunOfBlocks) {
        const int64_t end = run + kRunOfBlocks < in_group ? run + kRunOfBlocks : in_group;
        F part = {};
        for (int64_t block = group * in_group + run; block < group * in_group + end; ++block)
          part += read<Float32>(reinterpret_cast<const char *>(space + block * stride + at), where);
        total += part;
      }
      target.store(where, total);
    });
  });
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr
