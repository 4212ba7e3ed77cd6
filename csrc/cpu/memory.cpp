// Memory that callers bring: how much workspace an op wants, and large outputs that are about to be written.
#include "dmdr/abi.h"
#include "resize_space.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t size) { return ceil_div(size, DMDR_LORA_PAD) * DMDR_LORA_PAD; }
}  // namespace

extern "C" {

int64_t dmdr_dmd_gradient_workspace(int64_t outer_rows, int64_t inner) {
  return 4 * outer_rows * ceil_div(inner, DMDR_DMD_BLOCK);
}

int64_t dmdr_multi_lora_workspace(int64_t batch, int64_t rows, int64_t in_features, int64_t rank, int64_t out_features,
                                  int64_t backward) {
  if (!backward) return in_features * padded(rank) + rank * padded(out_features);
  const int64_t units = batch * ceil_div(rows, DMDR_LORA_UNIT);
  const int64_t parts = DMDR_LORA_PARTS(units);
  const int64_t part = rank * (in_features + out_features) + 2 * DMDR_LORA_UNIT * padded(rank);
  return out_features * padded(rank) + rank * padded(in_features) + parts * part;
}

int64_t dmdr_modulation_workspace(int64_t batch, int64_t rows, int64_t features, int64_t vectors) {
  return batch * ceil_div(rows, DMDR_NORM_BLOCK) * vectors * features;
}

int64_t dmdr_sde_step_workspace(int64_t outer_rows, int64_t inner) {
  return outer_rows * ceil_div(inner, DMDR_SDE_BLOCK);
}

int64_t dmdr_qk_norm_rope_workspace(int64_t batch, int64_t rows, int64_t features) {
  return batch * ceil_div(rows, DMDR_NORM_BLOCK) * features;
}

int64_t dmdr_preprocess_reward_workspace(int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                         int64_t antialias, int64_t num_threads) {
  using namespace dmdr;
  const int64_t bands = band_words(out_height, filter_width(height, out_height, antialias)) +
                        band_words(out_width, filter_width(width, out_width, antialias)) +
                        band_words(height, transposed_width(height, out_height, antialias)) +
                        band_words(width, transposed_width(width, out_width, antialias));
  return bands + (num_threads * resize_scratch(width, out_height, out_width) + 1) / 2;
}

void dmdr_cpu_expect_writes(void *data, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  // Advice only: a system without huge pages refuses it and nothing else changes.
  if (first < last) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // extern "C"
