// multi_lora: out = base + low_rank B with low_rank = scale_b (x A), and its gradients.
//
// The work is cut into units of up to kUnitRows rows of one sample, so that a unit's x and gradient stay in the cache
// while everything about them is computed, and a sample of scale 0 is skipped. Weight gradients are summed within
// a fixed number of parts of the units and then over the parts in order.
#include "kernels.h"
#include "matrix_tiles.h"
#include "parallel.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

constexpr int64_t kUnitRows = DMDR_LORA_UNIT;
constexpr int64_t kOuterColumns = 64;  // columns whose rows are kept in L1 for the weight gradients

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

// down[i][0..rank) = scale * (tensor row i) right, right packed [inner, rank]; down has `down_row` floats a row.
template <class Product, class Type>
void project_down(const dmdr_tensor &tensor, const Unit &unit, int64_t inner, const uint32_t *right, int64_t rank,
                  float scale, float *down, int64_t down_row) {
  const int64_t most = kPanel * Product::kPerWord;
  const Packing packed = packing<Product>(inner, rank);
  alignas(64) uint32_t panel[kTileRows * kPanel];
  for_row_tiles(unit.count, [&](auto rows, int64_t row) {
    constexpr int kRows = decltype(rows)::value;
    for (int64_t k = 0; k < inner; k += most) {
      const int64_t length = inner - k < most ? inner - k : most;
      for (int i = 0; i < kRows; ++i)
        fill_panel<Product>(row_of<Type>(tensor, unit, row + i), k, length, panel + i * kPanel);
      const bool first = k == 0, last = k + length == inner;
      for_column_tiles(rank, [&](auto vectors, auto where) {
        constexpr int kVectors = decltype(vectors)::value;
        F acc[kRows][kVectors] = {};
        char *const target = reinterpret_cast<char *>(down + row * down_row);
        multiply_add<Product>(acc, panel, kPanel, 1, right + packed.index(k / Product::kPerWord, where.at),
                              kVectors * kLanes, words_of<Product>(length));
        // A panel's sum is added as one number: the rounding errors of a sum grow with its length.
        for (int i = 0; i < kRows; ++i)
          for (int v = 0; v < kVectors; ++v) {
            const auto to = moved(where, v * kLanes);
            if (!first) acc[i][v] += read<Float32>(target + i * down_row * 4, to);
            write<Float32>(target + i * down_row * 4, to, last ? acc[i][v] * scale : acc[i][v]);
          }
      });
    }
  });
}

// out = base (or 0) + down up for a unit's rows; up packed [rank, columns].
template <class Product, class Type>
void project_up(const dmdr_tensor &base, const dmdr_tensor &out, const Unit &unit, const float *down, int64_t down_row,
                int64_t rank, const uint32_t *up, int64_t columns) {
  const bool has_base = base.data != nullptr;
  const int64_t most = kPanel * Product::kPerWord, in_panel = rank < most ? rank : most;
  const Packing packed = packing<Product>(rank, columns);
  alignas(64) uint32_t panel[kTileRows * kPanel];
  const dmdr_tensor low_rank = {const_cast<float *>(down), DMDR_F32, {}};
  for_row_tiles(unit.count, [&](auto rows, int64_t row) {
    constexpr int kRows = decltype(rows)::value;
    for (int i = 0; i < kRows; ++i)
      fill_panel<Product>(Row<Float32>(low_rank, (row + i) * down_row), 0, in_panel, panel + i * kPanel);
    for_column_tiles(columns, [&](auto vectors, auto where) {
      constexpr int kVectors = decltype(vectors)::value;
      F acc[kRows][kVectors] = {};
      if (has_base)
        for (int i = 0; i < kRows; ++i)
          for (int v = 0; v < kVectors; ++v)
            acc[i][v] = row_of<Type>(base, unit, row + i).load(moved(where, v * kLanes));
      multiply_add<Product>(acc, panel, kPanel, 1, up + packed.index(0, where.at), kVectors * kLanes,
                            words_of<Product>(in_panel));
      // A rank beyond the panel is read where it lies; only fp32 comes here with one.
      for (int64_t k = most; k < rank; ++k)
        for (int i = 0; i < kRows; ++i)
          for (int v = 0; v < kVectors; ++v)
            acc[i][v] += down[(row + i) * down_row + k] *
                         read<Float32>(reinterpret_cast<const char *>(up),
                                       Whole{packed.index(k, where.at) + v * kLanes});
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) row_of<Type>(out, unit, row + i).store(moved(where, v * kLanes), acc[i][v]);
    });
  });
}

// sums[r][0..columns) += sum over the unit's rows of down[row][r] * (tensor row), sums row-major with `columns`.
// `weights` is room for words_of(unit.count) * rank words.
template <class Product, class Type>
void accumulate_outer(const dmdr_tensor &tensor, const Unit &unit, const float *down, int64_t down_row, int64_t rank,
                      int64_t columns, uint32_t *weights, float *sums) {
  constexpr int64_t kStep = Product::kPerWord;
  const int64_t words = words_of<Product>(unit.count);
  // Tile by tile, each [words][ranks of the tile]: what a tile reads is contiguous, at any rank.
  std::memset(weights, 0, words * rank * 4);
  for_row_tiles(rank, [&](auto ranks, int64_t r) {
    constexpr int kRanks = decltype(ranks)::value;
    for (int64_t row = 0; row < unit.count; ++row)
      for (int i = 0; i < kRanks; ++i)
        Product::put(weights + r * words + row / kStep * kRanks + i, row % kStep, down[row * down_row + r + i]);
  });
  alignas(64) uint32_t panel[kUnitRows * kOuterColumns];  // the unit's rows as words, for all ranks to read from L1
  for (int64_t begin = 0; begin < columns; begin += kOuterColumns) {
    const int64_t some = columns - begin < kOuterColumns ? columns - begin : kOuterColumns;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t row = word * kStep, last = row + kStep - 1;
      const Row<Type> first = row_of<Type>(tensor, unit, row), second = row_of<Type>(tensor, unit, last);
      for_vectors(0, some, [&](auto where) {
        const U value = Product::zip(first, last < unit.count ? &second : nullptr, moved(where, begin));
        std::memcpy(panel + word * kOuterColumns + where.at, &value, sizeof value);
      });
    }
    for_row_tiles(rank, [&](auto ranks, int64_t r) {
      constexpr int kRanks = decltype(ranks)::value;
      for_column_tiles(some, [&](auto vectors, auto where) {
        constexpr int kVectors = decltype(vectors)::value;
        F acc[kRanks][kVectors];
        char *const target = reinterpret_cast<char *>(sums + r * columns + begin);
        for (int i = 0; i < kRanks; ++i)
          for (int v = 0; v < kVectors; ++v)
            acc[i][v] = read<Float32>(target + i * columns * 4, moved(where, v * kLanes));
        multiply_add<Product>(acc, weights + r * words, 1, kRanks, panel + where.at, kOuterColumns, words);
        for (int i = 0; i < kRanks; ++i)
          for (int v = 0; v < kVectors; ++v)
            write<Float32>(target + i * columns * 4, moved(where, v * kLanes), acc[i][v]);
      });
    });
  }
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

// Where the pieces of the backward's workspace lie.
struct BackwardSpace {
  float *up, *down, *part;  // B^T [out][rank], A^T [rank][in], then each part's sums and scratch
  int64_t sums_a, sums_b, scratch;
  explicit BackwardSpace(const dmdr_multi_lora_args &args)
      : up(args.workspace), down(up + args.out_features * padded(args.rank)),
        part(down + args.rank * padded(args.in_features)), sums_a(args.rank * args.in_features),
        sums_b(args.rank * args.out_features), scratch(kUnitRows * padded(args.rank)) {}
  float *part_at(int64_t index) const { return part + index * (sums_a + sums_b + 2 * scratch); }
};

uint32_t *words(float *space) { return reinterpret_cast<uint32_t *>(space); }

template <class Product, class Type>
void backward_part(const dmdr_multi_lora_args &args, const BackwardSpace &space, int64_t first, int64_t last,
                   float *sums_a) {
  float *const sums_b = sums_a + space.sums_a, *const low_rank_grad = sums_b + space.sums_b;
  uint32_t *const weights = words(low_rank_grad + space.scratch);
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
      project_down<Product, Type>(args.grad, unit, args.out_features, words(space.up), args.rank, scale, low_rank_grad,
                                  width);
    if (args.grad_x.data != nullptr)
      project_up<Product, Type>(dmdr_tensor{}, args.grad_x, unit, low_rank_grad, width, args.rank, words(space.down),
                                args.in_features);
    if (args.grad_a != nullptr)
      accumulate_outer<Product, Type>(args.x, unit, low_rank_grad, width, args.rank, args.in_features, weights, sums_a);
    if (args.grad_b != nullptr)
      accumulate_outer<Product, Type>(args.grad, unit,
                                      args.low_rank + (unit.sample * args.rows + unit.first) * args.rank, args.rank,
                                      args.rank, args.out_features, weights, sums_b);
  }
}

template <class Product, class Type>
void forward_unit(const dmdr_multi_lora_args &args, const uint32_t *down, const uint32_t *up, int64_t index) {
  const Unit unit(args, index);
  const float scale = args.scale[unit.sample];
  float *const low_rank = args.low_rank + (unit.sample * args.rows + unit.first) * args.rank;
  if (scale == 0.f) {
    std::memset(low_rank, 0, unit.count * args.rank * 4);
    copy_rows<Type>(args.base, args.out, unit, args.out_features);
    return;
  }
  project_down<Product, Type>(args.x, unit, args.in_features, down, args.rank, scale, low_rank, args.rank);
  project_up<Product, Type>(args.base, args.out, unit, low_rank, args.rank, args.rank, up, args.out_features);
}

// run(Product{}, Type{}): pairs where every tensor is bf16 and the CPU multiplies them, else fp32.
template <class Run>
void with_products(const dmdr_multi_lora_args &args, std::initializer_list<const dmdr_tensor *> tensors, Run run) {
  with_common_type(tensors, [&](auto type) {
#if defined(__AVX512BF16__)
    using Type = decltype(type);
    const bool pairs = args.A.dtype == DMDR_BF16 && args.B.dtype == DMDR_BF16 && args.rank <= kPanel * Pairs::kPerWord;
    if constexpr (Type::kIsBfloat16)
      if (pairs) return run(Pairs{}, type);
#endif
    (void)args;
    run(Single{}, type);
  });
}

// use(r, where, total) with the parts' sums of row r's elements at `where`, added in order.
template <class Use>
void sum_parts(const dmdr_multi_lora_args &args, const BackwardSpace &space, int64_t parts, int64_t at, int64_t columns,
               Use use) {
  for_items(args.rank, args.rank * columns * parts, args.num_threads, [&](int64_t r) {
    for_vectors(0, columns, [&](auto where) {
      F total = {};
      for (int64_t part = 0; part < parts; ++part)
        total += read<Float32>(reinterpret_cast<const char *>(space.part_at(part) + at + r * columns), where);
      use(r, where, total);
    });
  });
}

}  // namespace

void multi_lora_fwd(const dmdr_multi_lora_args &args) {
  uint32_t *const down = words(args.workspace), *const up = down + args.in_features * padded(args.rank);
  const int64_t elements = args.batch * args.rows * (args.in_features + args.out_features);
  with_products(args, {&args.x, &args.base, &args.out}, [&](auto product, auto type) {
    using Product = decltype(product);
    pack<Product>(args.A, args.in_features, args.rank, false, down);
    pack<Product>(args.B, args.rank, args.out_features, false, up);
    for_items(unit_count(args.batch, args.rows), elements, args.num_threads,
              [&](int64_t index) { forward_unit<Product, decltype(type)>(args, down, up, index); });
  });
}

void multi_lora_bwd(const dmdr_multi_lora_args &args) {
  const BackwardSpace space(args);
  const int64_t units = unit_count(args.batch, args.rows), parts = DMDR_LORA_PARTS(units);
  const int64_t elements = args.batch * args.rows * (args.in_features + args.out_features);
  with_products(args, {&args.x, &args.grad, &args.grad_x}, [&](auto product, auto type) {
    using Product = decltype(product);
    pack<Product>(args.B, args.out_features, args.rank, true, words(space.up));
    pack<Product>(args.A, args.rank, args.in_features, true, words(space.down));
    for_items(parts, elements, args.num_threads, [&](int64_t part) {
      backward_part<Product, decltype(type)>(args, space, part * units / parts, (part + 1) * units / parts,
                                             space.part_at(part));
    });
  });
  if (args.grad_a != nullptr)
    sum_parts(args, space, parts, 0, args.in_features, [&](int64_t r, auto where, F total) {
      for (int64_t lane = 0; lane < kLanes && where.at + lane < args.in_features; ++lane)
        args.grad_a[(where.at + lane) * args.rank + r] = total[lane];
    });
  if (args.grad_b != nullptr)
    sum_parts(args, space, parts, space.sums_a, args.out_features, [&](int64_t r, auto where, F total) {
      write<Float32>(reinterpret_cast<char *>(args.grad_b + r * args.out_features), where, total);
    });
}

inline dmdr_status check(const dmdr_multi_lora_args &args) {
  if (has_bad_dtype({args.x, args.base, args.out, args.A, args.B, args.grad, args.grad_x})) return DMDR_ERROR_DTYPE;
  const bool bad = args.batch < 0 || args.rows < 0 || args.in_features <= 0 || args.rank <= 0 || args.out_features < 0;
  return bad ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

#if defined(DMDR_EXPORTS)
int64_t dmdr_multi_lora_workspace(int64_t batch, int64_t rows, int64_t in_features, int64_t rank, int64_t out_features,
                                  int64_t backward) {
  using namespace dmdr::DMDR_LEVEL;
  if (!backward) return in_features * padded(rank) + rank * padded(out_features);
  const int64_t units = batch * ceil_div(rows, DMDR_LORA_UNIT);
  const int64_t parts = DMDR_LORA_PARTS(units);
  const int64_t part = rank * (in_features + out_features) + 2 * DMDR_LORA_UNIT * padded(rank);
  return out_features * padded(rank) + rank * padded(in_features) + parts * part;
}
#endif

DMDR_ENTRY_BF16(multi_lora_fwd, dmdr_multi_lora_args)
DMDR_ENTRY_BF16(multi_lora_bwd, dmdr_multi_lora_args)
