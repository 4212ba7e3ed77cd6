// Small matrix products in register tiles: the pieces of multi_lora.
#pragma once

#include "lanes.h"

namespace dmdr {
namespace DMDR_LEVEL {

constexpr int64_t kPanel = 256;  // words of a row that are multiplied at a time: kTileRows such rows fit in L1
#if defined(__AVX512F__)
constexpr int kTileRows = 8;  // with two vectors 16 accumulators: of 32 registers
#else
constexpr int kTileRows = 4;  // 8 accumulators: of 16 registers
#endif

inline int64_t padded(int64_t size) { return (size + DMDR_LORA_PAD - 1) / DMDR_LORA_PAD * DMDR_LORA_PAD; }

// How products are formed. Both kinds work on 32-bit words: a float, or a pair of bf16 neighbours along the summed
// dimension, whose two products one instruction adds to an fp32 sum.
struct Single {
  using Panel = Float32;
  static constexpr int64_t kPerWord = 1;
  static DMDR_INLINE F multiply_add(F acc, uint32_t left, U right) {
    return acc + from_bits(U{} + left) * from_bits(right);
  }
  // The words of a step: the values of one row.
  template <class Type, class Where>
  static DMDR_INLINE U zip(const Row<Type> &row, const Row<Type> *, Where where) {
    return bits(row.load(where));
  }
  static void put(uint32_t *word, int64_t, float value) { std::memcpy(word, &value, 4); }
};

#if defined(__AVX512BF16__)
// bf16 operands as tensor cores and bf16 matmuls take them: x, A, B and gradients are bf16 already, the low-rank
// product is rounded once before it is multiplied again (a plain bf16 chain rounds it, its product and the scaled one).
struct Pairs {
  using Panel = Bfloat16;
  static constexpr int64_t kPerWord = 2;
  static DMDR_INLINE F multiply_add(F acc, uint32_t left, U right) {
    return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(U{} + left), (__m512bh)right);
  }
  // Pairs of two rows' values; `second` null is a row of zeros.
  template <class Type, class Where>
  static DMDR_INLINE U zip(const Row<Type> &first, const Row<Type> *second, Where where) {
    const U low = bits(first.load(where)) >> 16;
    return second == nullptr ? low : low | bits(second->load(where));
  }
  static void put(uint32_t *word, int64_t half, float value) {
    const H rounded = Bfloat16::rounded(splat(value));
    std::memcpy(reinterpret_cast<char *>(word) + 2 * half, &rounded, 2);
  }
};
#endif

// acc[i][v] += sum_k left[i * left_row + k * left_k] * right[k * right_k + v], k counting words.
template <class Product, int Rows, int Vectors>
DMDR_INLINE void multiply_add(F (&acc)[Rows][Vectors], const uint32_t *left, int64_t left_row, int64_t left_k,
                              const uint32_t *right, int64_t right_k, int64_t words) {
  for (int64_t k = 0; k < words; ++k, left += left_k, right += right_k) {
    U column[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) std::memcpy(&column[v], right + v * kLanes, sizeof(U));
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) acc[i][v] = Product::multiply_add(acc[i][v], left[i * left_row], column[v]);
  }
}

template <class Product>
DMDR_INLINE int64_t words_of(int64_t count) {
  return (count + Product::kPerWord - 1) / Product::kPerWord;
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

// body(Count<vectors>, where) over columns: pairs of vectors, then single ones, the last perhaps a tail.
template <class Body>
DMDR_INLINE void for_column_tiles(int64_t columns, Body body) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) body(Count<2>{}, Whole{column});
  for (; column + kLanes <= columns; column += kLanes) body(Count<1>{}, Whole{column});
  if (column < columns) body(Count<1>{}, Tail{column, static_cast<int>(columns - column)});
}

// Where the words of a packed matrix [summed, columns] lie: one column tile of for_column_tiles after the other, each
// row-major, so that a product reads its tile from start to end. (With rows of all columns, those of a tile share a few
// sets of the L1 cache, and each is in a page of its own.)
struct Packing {
  int64_t rows, pairs;  // words along the summed dimension; columns before this one are in tiles of two vectors
  int64_t width(int64_t column) const { return column < pairs ? 2 * kLanes : kLanes; }
  int64_t index(int64_t row, int64_t column) const {
    const int64_t wide = width(column), within = column % wide;
    return (column - within) * rows + row * wide + within;
  }
};

template <class Product>
Packing packing(int64_t summed, int64_t columns) {
  return {words_of<Product>(summed), columns / (2 * kLanes) * (2 * kLanes)};
}

// Packs a matrix [summed, columns]; what is beyond it is 0. `transposed`: the tensor is [columns, summed].
template <class Product>
void pack(const dmdr_tensor &matrix, int64_t summed, int64_t columns, bool transposed, uint32_t *packed) {
  const Packing at = packing<Product>(summed, columns);
  const int64_t rows = transposed ? columns : summed, length = transposed ? summed : columns;
  std::memset(packed, 0, at.rows * padded(columns) * 4);
  alignas(64) float lanes[kLanes];
  for (int64_t row = 0; row < rows; ++row) {
    const Row<Mixed> source(matrix, row * matrix.stride[0]);
    for_vectors(0, length, [&](auto where) {
      const F values = source.load(where);
      std::memcpy(lanes, &values, sizeof values);
      for (int64_t lane = 0; lane < kLanes && where.at + lane < length; ++lane) {
        const int64_t k = transposed ? where.at + lane : row, column = transposed ? row : where.at + lane;
        Product::put(packed + at.index(k / Product::kPerWord, column), k % Product::kPerWord, lanes[lane]);
      }
    });
  }
}

// A row's elements [k, k + length) as a panel's words; the half word after an odd length is 0.
template <class Product, class Source>
DMDR_INLINE void fill_panel(const Source &source, int64_t k, int64_t length, uint32_t *panel) {
  using Panel = typename Product::Panel;
  char *const to = reinterpret_cast<char *>(panel);
  for_vectors(0, length, [&](auto where) { write<Panel>(to, where, source.load(moved(where, k))); });
  if (length % Product::kPerWord != 0) std::memset(to + length * Panel::kBytes, 0, Panel::kBytes);
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr
