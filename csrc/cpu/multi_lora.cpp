// multi_lora: out = base + low_rank B with low_rank = scale_b (x A), and its gradients.
//
// The work is cut into units of up to kUnitRows rows of one sample, so that a unit's x and gradient stay in the cache
// while everything about them is computed, and a sample of scale 0 is skipped. Weight gradients are summed within
// DMDR_LORA_PARTS fixed parts of the units and then over the parts in order.
#include "kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

constexpr int64_t kUnitRows = DMDR_LORA_UNIT;
constexpr int64_t kPanel = 512;  // inner elements of x converted to fp32 at a time: kTileRows of them fit in L1
#if defined(__AVX512F__)
constexpr int kTileRows = 8;  // with two vectors 16 accumulators: of 32 registers
#else
constexpr int kTileRows = 4;  // 8 accumulators: of 16 registers
#endif

int64_t padded(int64_t size) { return (size + DMDR_LORA_PAD - 1) / DMDR_LORA_PAD * DMDR_LORA_PAD; }

// acc[i][v] += sum_k left[i * left_row + k * left_k] * right[k * right_k + v]
template <int Rows, int Vectors>
DMDR_INLINE void multiply_add(F (&acc)[Rows][Vectors], const float *left, int64_t left_row, int64_t left_k,
                              const float *right, int64_t right_k, int64_t count) {
  for (int64_t k = 0; k < count; ++k, left += left_k, right += right_k) {
    F column[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) std::memcpy(&column[v], right + v * kLanes, sizeof(F));
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const F row = splat(left[i * left_row]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) acc[i][v] += row * column[v];
    }
  }
}

// body(Count<n>, first) in steps of kTileRows and then of 1.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class Body>
DMDR_INLINE void for_row_tiles(int64_t rows, Body body) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) body(Count<kTileRows>{}, row);
  for (; row < rows; ++row) body(Count<1>{}, row);
}

// body(Count<vectors>, column, where...) over columns: pairs of vectors, then single ones, the last perhaps a tail.
template <class Body>
DMDR_INLINE void for_column_tiles(int64_t columns, Body body) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) body(Count<2>{}, Whole{column});
  for (; column + kLanes <= columns; column += kLanes) body(Count<1>{}, Whole{column});
  if (column < columns) body(Count<1>{}, Tail{column, static_cast<int>(columns - column)});
}

// A matrix [rows, columns] as fp32, row-major with padded columns (zeros), or transposed.
template <class Type>
void pack(const dmdr_tensor &matrix, int64_t rows, int64_t columns, float *packed) {
  const int64_t width = padded(columns);
  for (int64_t row = 0; row < rows; ++row, packed += width) {
    const Row<Type> source(matrix, row * matrix.stride[0]);
    for_vectors(0, columns, [&](auto where) { write<Float32>(reinterpret_cast<char *>(packed), where, source.load(where)); });
    for (int64_t column = columns; column < width; ++column) packed[column] = 0.f;
  }
}
template <class Type>
void pack_transposed(const dmdr_tensor &matrix, int64_t rows, int64_t columns, float *packed) {
  const int64_t width = padded(rows);
  for (int64_t row = 0; row < width; ++row) {
    alignas(64) float lanes[kLanes];
    if (row >= rows) {
      for (int64_t column = 0; column < columns; ++column) packed[column * width + row] = 0.f;
      continue;
    }
    const Row<Type> source(matrix, row * matrix.stride[0]);
    for_vectors(0, columns, [&](auto where) {
      const F x = source.load(where);
      std::memcpy(lanes, &x, sizeof x);
      for (int lane = 0; lane < kLanes && where.at + lane < columns; ++lane)
        packed[(where.at + lane) * width + row] = lanes[lane];
    });
  }
}

// A unit: rows [first, first + count) of a sample.
struct Unit {
  int64_t sample, first, count;
  Unit(const dmdr_multi_lora_args &args, int64_t index) {
    const int64_t per_sample = (args.rows + kUnitRows - 1) / kUnitRows;
    sample = index / per_sample;
    first = index % per_sample * kUnitRows;
    count = args.rows - first < kUnitRows ? args.rows - first : kUnitRows;
  }
  int64_t row(int64_t i) const { return first + i; }
};
int64_t unit_count(int64_t batch, int64_t rows) { return batch * ((rows + kUnitRows - 1) / kUnitRows); }

template <class Type>
DMDR_INLINE Row<Type> row_of(const dmdr_tensor &tensor, const Unit &unit, int64_t i) {
  return Row<Type>(tensor, unit.sample * tensor.stride[0] + unit.row(i) * tensor.stride[1]);
}

// down[i][0..rank) = scale * (tensor row i) right, right packed [inner][padded(rank)]; down has `down_row` floats a row.
template <class Type>
void project_down(const dmdr_tensor &tensor, const Unit &unit, int64_t inner, const float *right, int64_t rank,
                  float scale, float *down, int64_t down_row) {
  const int64_t width = padded(rank);
  alignas(64) float panel[kTileRows * kPanel];
  for_row_tiles(unit.count, [&](auto rows, int64_t row) {
    constexpr int kRows = decltype(rows)::value;
    for (int64_t k = 0; k < inner; k += kPanel) {
      const int64_t length = inner - k < kPanel ? inner - k : kPanel;
      for (int i = 0; i < kRows; ++i) {
        const Row<Type> source = row_of<Type>(tensor, unit, row + i);
        char *const target = reinterpret_cast<char *>(panel + i * kPanel - k);
        for_vectors(k, length, [&](auto where) { write<Float32>(target, where, source.load(where)); });
      }
      const bool first = k == 0, last = k + length == inner;
      for_column_tiles(rank, [&](auto vectors, auto where) {
        constexpr int kVectors = decltype(vectors)::value;
        F acc[kRows][kVectors] = {};
        char *const target = reinterpret_cast<char *>(down + row * down_row);
        if (!first)
          for (int i = 0; i < kRows; ++i)
            for (int v = 0; v < kVectors; ++v) acc[i][v] = read<Float32>(target + i * down_row * 4, moved(where, v * kLanes));
        multiply_add(acc, panel, kPanel, 1, right + k * width + where.at, width, length);
        for (int i = 0; i < kRows; ++i)
          for (int v = 0; v < kVectors; ++v)
            write<Float32>(target + i * down_row * 4, moved(where, v * kLanes), last ? acc[i][v] * scale : acc[i][v]);
      });
    }
  });
}

// out = base (or 0) + down up for a unit's rows; up packed [rank][padded(columns)].
template <class Type>
void project_up(const dmdr_tensor &base, const dmdr_tensor &out, const Unit &unit, const float *down, int64_t down_row,
                int64_t rank, const float *up, int64_t columns) {
  const bool has_base = base.data != nullptr;
  const int64_t width = padded(columns);
  for_row_tiles(unit.count, [&](auto rows, int64_t row) {
    constexpr int kRows = decltype(rows)::value;
    for_column_tiles(columns, [&](auto vectors, auto where) {
      constexpr int kVectors = decltype(vectors)::value;
      F acc[kRows][kVectors] = {};
      if (has_base)
        for (int i = 0; i < kRows; ++i)
          for (int v = 0; v < kVectors; ++v) acc[i][v] = row_of<Type>(base, unit, row + i).load(moved(where, v * kLanes));
      multiply_add(acc, down + row * down_row, down_row, 1, up + where.at, width, rank);
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) row_of<Type>(out, unit, row + i).store(moved(where, v * kLanes), acc[i][v]);
    });
  });
}

// sums[r][0..columns) += sum over the unit's rows of down[row][r] * (tensor row), sums row-major with `columns`.
template <class Type>
void accumulate_outer(const dmdr_tensor &tensor, const Unit &unit, const float *down, int64_t down_row, int64_t rank,
                      int64_t columns, float *sums) {
  for_row_tiles(rank, [&](auto ranks, int64_t r) {
    constexpr int kRanks = decltype(ranks)::value;
    for_column_tiles(columns, [&](auto vectors, auto where) {
      constexpr int kVectors = decltype(vectors)::value;
      F acc[kRanks][kVectors];
      char *const target = reinterpret_cast<char *>(sums + r * columns);
      for (int i = 0; i < kRanks; ++i)
        for (int v = 0; v < kVectors; ++v) acc[i][v] = read<Float32>(target + i * columns * 4, moved(where, v * kLanes));
      for (int64_t row = 0; row < unit.count; ++row) {
        const Row<Type> source = row_of<Type>(tensor, unit, row);
        F value[kVectors];
        for (int v = 0; v < kVectors; ++v) value[v] = source.load(moved(where, v * kLanes));
        const float *const weight = down + row * down_row + r;
#pragma GCC unroll 8
        for (int i = 0; i < kRanks; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) acc[i][v] += splat(weight[i]) * value[v];
      }
      for (int i = 0; i < kRanks; ++i)
        for (int v = 0; v < kVectors; ++v) write<Float32>(target + i * columns * 4, moved(where, v * kLanes), acc[i][v]);
    });
  });
}

template <class Type>
void copy_rows(const dmdr_tensor &from, const dmdr_tensor &to, const Unit &unit, int64_t columns) {
  for (int64_t i = 0; i < unit.count; ++i) {
    const Row<Type> target = row_of<Type>(to, unit, i);
    if (from.data == nullptr) {
      for_vectors(0, columns, [&](auto where) { target.store(where, F{}); });
    } else {
      const Row<Type> source = row_of<Type>(from, unit, i);
      for_vectors(0, columns, [&](auto where) { target.store(where, source.load(where)); });
    }
  }
}

int64_t part_count(int64_t units) { return units < DMDR_LORA_PARTS ? units : DMDR_LORA_PARTS; }

// Where the pieces of the backward's workspace lie.
struct BackwardSpace {
  float *up, *down, *part;  // B^T [out][padded(rank)], A^T [rank][padded(in)], then a part's sums and scratch each
  int64_t sums_a, sums_b, scratch;
  explicit BackwardSpace(const dmdr_multi_lora_args &args)
      : up(args.workspace), down(up + args.out_features * padded(args.rank)),
        part(down + args.rank * padded(args.in_features)), sums_a(args.rank * args.in_features),
        sums_b(args.rank * args.out_features), scratch(kUnitRows * padded(args.rank)) {}
  float *part_at(int64_t index) const { return part + index * (sums_a + sums_b + scratch); }
};

template <class Type>
void backward_part(const dmdr_multi_lora_args &args, const BackwardSpace &space, int64_t first, int64_t last,
                   float *sums_a) {
  float *const sums_b = sums_a + space.sums_a, *const low_rank_grad = sums_b + space.sums_b;
  const int64_t width = padded(args.rank);
  if (args.grad_a != nullptr) std::memset(sums_a, 0, space.sums_a * 4);
  if (args.grad_b != nullptr) std::memset(sums_b, 0, space.sums_b * 4);
  for (int64_t index = first; index < last; ++index) {
    const Unit unit(args, index);
    const float scale = args.scale[unit.sample];
    if (scale == 0.f) {
      if (args.grad_x.data != nullptr) copy_rows<Type>(dmdr_tensor{}, args.grad_x, unit, args.in_features);
      continue;
    }
    if (args.grad_x.data != nullptr || args.grad_a != nullptr)
      project_down<Type>(args.grad, unit, args.out_features, space.up, args.rank, scale, low_rank_grad, width);
    if (args.grad_x.data != nullptr)
      project_up<Type>(dmdr_tensor{}, args.grad_x, unit, low_rank_grad, width, args.rank, space.down,
                       args.in_features);
    if (args.grad_a != nullptr)
      accumulate_outer<Type>(args.x, unit, low_rank_grad, width, args.rank, args.in_features, sums_a);
    if (args.grad_b != nullptr)
      accumulate_outer<Type>(args.grad, unit, args.low_rank + (unit.sample * args.rows + unit.first) * args.rank,
                             args.rank, args.rank, args.out_features, sums_b);
  }
}

}  // namespace

void multi_lora_fwd(const dmdr_multi_lora_args &args) {
  float *const down = args.workspace, *const up = down + args.in_features * padded(args.rank);
  with_common_type({&args.A, &args.B}, [&](auto type) {
    pack<decltype(type)>(args.A, args.in_features, args.rank, down);
    pack<decltype(type)>(args.B, args.rank, args.out_features, up);
  });
  const int64_t elements = args.batch * args.rows * (args.in_features + args.out_features);
  with_common_type({&args.x, &args.base, &args.out}, [&](auto type) {
    using Type = decltype(type);
    for_items(unit_count(args.batch, args.rows), elements, args.num_threads, [&](int64_t index) {
      const Unit unit(args, index);
      const float scale = args.scale[unit.sample];
      float *const low_rank = args.low_rank + (unit.sample * args.rows + unit.first) * args.rank;
      if (scale == 0.f) {
        std::memset(low_rank, 0, unit.count * args.rank * 4);
        copy_rows<Type>(args.base, args.out, unit, args.out_features);
        return;
      }
      project_down<Type>(args.x, unit, args.in_features, down, args.rank, scale, low_rank, args.rank);
      project_up<Type>(args.base, args.out, unit, low_rank, args.rank, args.rank, up, args.out_features);
    });
  });
}

void multi_lora_bwd(const dmdr_multi_lora_args &args) {
  const BackwardSpace space(args);
  with_common_type({&args.A, &args.B}, [&](auto type) {
    pack_transposed<decltype(type)>(args.B, args.rank, args.out_features, space.up);
    // A is [in, rank]: its transpose is [rank, in] with padded rows of in.
    pack_transposed<decltype(type)>(args.A, args.in_features, args.rank, space.down);
  });
  const int64_t units = unit_count(args.batch, args.rows), parts = part_count(units);
  const int64_t elements = args.batch * args.rows * (args.in_features + args.out_features);
  with_common_type({&args.x, &args.grad, &args.grad_x}, [&](auto type) {
    using Type = decltype(type);
    for_items(parts, elements, args.num_threads, [&](int64_t part) {
      backward_part<Type>(args, space, part * units / parts, (part + 1) * units / parts, space.part_at(part));
    });
  });
  const int64_t rows = args.rank;
  if (args.grad_a != nullptr)
    for_items(rows, rows * args.in_features * parts, args.num_threads, [&](int64_t r) {
      for (int64_t i = 0; i < args.in_features; ++i) {
        float total = 0.f;
        for (int64_t part = 0; part < parts; ++part) total += space.part_at(part)[r * args.in_features + i];
        args.grad_a[i * rows + r] = total;
      }
    });
  if (args.grad_b != nullptr)
    for_items(rows, rows * args.out_features * parts, args.num_threads, [&](int64_t r) {
      for (int64_t i = 0; i < args.out_features; ++i) {
        float total = 0.f;
        for (int64_t part = 0; part < parts; ++part)
          total += space.part_at(part)[space.sums_a + r * args.out_features + i];
        args.grad_b[r * args.out_features + i] = total;
      }
    });
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr
