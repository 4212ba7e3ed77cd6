// How an op's rows are cut into items and handed to threads.
#pragma once

#include <omp.h>

#include <cstdint>

#include "dmdr/abi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dmdr {
namespace DMDR_LEVEL {

// Below this many elements a kernel is done before a second thread has woken up (about 10 us at 2 elements a cycle).
constexpr int64_t kElementsWorthThreads = 32768;

// Stores past the caches (see Output in lanes.h) are ordered before what this thread does next.
inline void publish() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// fn(item) for every item in [first, last), or from the end: then the last kStretch items first, each stretch forwards,
// for hardware prefetches what goes on for a while.
constexpr int64_t kStretch = 32;
template <class Fn>
inline void walk(int64_t first, int64_t last, bool from_end, Fn &fn) {
  const int64_t stretch = from_end ? kStretch : last - first;
  for (int64_t end = last; end > first; end -= stretch)
    for (int64_t item = end - stretch < first ? first : end - stretch; item < end; ++item) fn(item);
}

// fn(item) for every item in [0, items), each on one thread. Which thread never changes a result; it is the same one from
// the end, where a thread first takes what it last took forwards, and is likely to find it in a cache.
template <class Fn>
inline void for_items(int64_t items, int64_t elements, int64_t num_threads, Fn fn, bool from_end = false) {
  if (num_threads <= 1 || items <= 1 || elements < kElementsWorthThreads) {
    walk(0, items, from_end, fn);
    publish();
    return;
  }
  const int threads = static_cast<int>(num_threads < items ? num_threads : items);
#pragma omp parallel num_threads(threads)
  {
    const int64_t number = omp_get_thread_num(), team = omp_get_num_threads();
    walk(items * number / team, items * (number + 1) / team, from_end, fn);
    publish();
  }
}

// The number of the thread that runs an item, for scratch memory that num_threads threads share.
inline int64_t thread_number() { return omp_get_thread_num(); }

// An op's shape as rows of contiguous elements, each row cut into pieces of `piece` elements.
struct Pieces {
  const int64_t *shape;
  int64_t inner, rows, per_row, piece;

  Pieces(const int64_t *shape, int64_t piece) : shape(shape), inner(shape[DMDR_OUTER]), rows(1), piece(piece) {
    for (int dim = 0; dim < DMDR_OUTER; ++dim) rows *= shape[dim];
    per_row = (inner + piece - 1) / piece;
  }
  int64_t items() const { return rows * per_row; }
  int64_t elements() const { return rows * inner; }
  int64_t row(int64_t item) const { return item / per_row; }
  int64_t first(int64_t item) const { return item % per_row * piece; }
  int64_t count(int64_t item) const {
    const int64_t left = inner - first(item);
    return left < piece ? left : piece;
  }
};

// The outer index of a row, for as many tensors as share the shape.
struct Position {
  int64_t index[DMDR_OUTER];

  Position(const int64_t *shape, int64_t row) {
    for (int dim = DMDR_OUTER - 1; dim >= 0; --dim) {
      index[dim] = shape[dim] == 1 ? 0 : row % shape[dim];
      row = shape[dim] == 1 ? row : row / shape[dim];
    }
  }
  int64_t batch() const { return index[0]; }
  int64_t offset(const dmdr_tensor &tensor) const {
    int64_t elements = 0;
    for (int dim = 0; dim < DMDR_OUTER; ++dim) elements += index[dim] * tensor.stride[dim];
    return elements;
  }
};

}  // namespace DMDR_LEVEL
}  // namespace dmdr
