// preprocess_reward: out = (resize((clamp(x) - low) / (high - low)) - mean) / std, and its gradient.
//
// Rows first, then columns: a vertical pass streams whole image rows; the horizontal pass works on kLanes of its rows
// at once, transposed, so that every tap is one vector multiply-add and nothing outside a filter is touched (a NaN
// stays where the formula has it). Sums run in tap order: no atomics, and no thread count changes a bit.
#include "kernels.h"
#include "parallel.h"
#include "resize.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

using Args = dmdr_preprocess_reward_args;

// Rows [kLanes][columns], `row` floats apart, to columns [columns][kLanes], or back.
DMDR_INLINE void transpose_block(F (&block)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    I low, high;  // which lanes of the pair (a, b) make up the new a and b
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = (lane & half) == 0 ? lane : kLanes + lane - half;
      high[lane] = (lane & half) == 0 ? lane + half : kLanes + lane;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & half) != 0) continue;
      const F a = block[i], b = block[i + half];
      block[i] = __builtin_shuffle(a, b, low);
      block[i + half] = __builtin_shuffle(a, b, high);
    }
  }
}
inline void rows_to_columns(const float *rows, int64_t row, int64_t columns, float *out) {
  for (int64_t x = 0; x < columns; x += kLanes) {
    F block[kLanes];
    for (int i = 0; i < kLanes; ++i) std::memcpy(&block[i], rows + i * row + x, sizeof(F));
    transpose_block(block);
    for (int i = 0; i < kLanes; ++i) std::memcpy(out + (x + i) * kLanes, &block[i], sizeof(F));
  }
}
inline void columns_to_rows(const float *columns, int64_t count, float *rows, int64_t row) {
  for (int64_t x = 0; x < count; x += kLanes) {
    F block[kLanes];
    for (int i = 0; i < kLanes; ++i) std::memcpy(&block[i], columns + (x + i) * kLanes, sizeof(F));
    transpose_block(block);
    for (int i = 0; i < kLanes; ++i) std::memcpy(rows + i * row + x, &block[i], sizeof(F));
  }
}

// out[i] = sum_j weight[i][j] in[first[i] + j] on columns of kLanes rows.
inline void filter_columns(const Band &band, const float *in, float *out) {
  for (int64_t i = 0; i < band.rows; ++i) {
    const float *const weight = band.weight + i * band.width;
    const float *tap = in + band.first[i] * kLanes;
    F total = {};
    for (int64_t j = 0; j < band.count[i]; ++j, tap += kLanes) {
      F value;
      std::memcpy(&value, tap, sizeof value);
      total += weight[j] * value;
    }
    std::memcpy(out + i * kLanes, &total, sizeof total);
  }
}

// The workspace: the bands, then scratch for each thread.
struct Space {
  Band vertical, horizontal, back_vertical, back_horizontal;
  float *scratch;
  int64_t per_thread;
  Space(const Args &args, bool backward) {
    const bool antialias = args.antialias != 0;
    int64_t *next = args.workspace;
    const auto band = [&next](int64_t rows, int64_t width) {
      const Band made = {rows, width, next, next + rows, reinterpret_cast<float *>(next + 2 * rows)};
      next += band_words(rows, width);
      return made;
    };
    vertical = band(args.out_height, filter_width(args.height, args.out_height, antialias));
    horizontal = band(args.out_width, filter_width(args.width, args.out_width, antialias));
    fill_band(args.height, args.out_height, antialias, vertical);
    fill_band(args.width, args.out_width, antialias, horizontal);
    if (backward) {
      back_vertical = band(args.height, transposed_width(args.height, args.out_height, antialias));
      back_horizontal = band(args.width, transposed_width(args.width, args.out_width, antialias));
      transpose_band(vertical, back_vertical);
      transpose_band(horizontal, back_horizontal);
    }
    scratch = reinterpret_cast<float *>(next);
    per_thread = resize_scratch(args.width, args.out_height, args.out_width);
  }
  float *of_thread() const { return scratch + thread_number() * per_thread; }
};

template <class Type>
DMDR_INLINE Row<Type> image_row(const dmdr_tensor &image, int64_t plane, int64_t channels, int64_t y) {
  const int64_t start = plane / channels * image.stride[0] + plane % channels * image.stride[1];
  return Row<Type>(image, start + y * image.stride[2]);
}

// to[x] = sum_j weight[j] clamp(image[first + j][x])
template <class Type>
void filter_image_rows(const Args &args, int64_t plane, const Band &band, int64_t i, float *to) {
  const F low = splat(static_cast<float>(args.low)), high = splat(static_cast<float>(args.high));
  const float *const weight = band.weight + i * band.width;
  const int64_t count = band.count[i];
  const Row<Type> top = image_row<Type>(args.image, plane, args.channels, band.first[i]);
  const int64_t step = image_row<Type>(args.image, plane, args.channels, band.first[i] + 1).base - top.base;
  for_vectors(0, args.width, [&](auto where) {
    Row<Type> row = top;
    F total = {};
    for (int64_t j = 0; j < count; ++j, row.base += step) {
      F x = row.load(where);
      x = select(x < low, low, x);  // in this order NaN stays NaN
      x = select(x > high, high, x);
      total += weight[j] * x;
    }
    write<Float32>(reinterpret_cast<char *>(to), where, total);
  });
}

// The output rows [first, first + kLanes) of a plane.
template <class Type>
void forward_rows(const Args &args, const Space &space, int64_t plane, int64_t first) {
  const int64_t row = resize_padded(args.width), out_row = resize_padded(args.out_width);
  float *const rows = space.of_thread(), *const columns = rows + kLanes * row;
  float *const out_columns = columns + kLanes * row, *const out_rows = out_columns + kLanes * out_row;
  const int64_t count = args.out_height - first < kLanes ? args.out_height - first : kLanes;
  for (int64_t i = 0; i < count; ++i) filter_image_rows<Type>(args, plane, space.vertical, first + i, rows + i * row);
  rows_to_columns(rows, row, args.width, columns);
  filter_columns(space.horizontal, columns, out_columns);
  columns_to_rows(out_columns, args.out_width, out_rows, out_row);
  // (unit - mean) / std with unit = (x - low) / (high - low): the weights of a filter sum to 1.
  const double range = args.high - args.low, std = args.std[plane % args.channels];
  const F gain = splat(static_cast<float>(1. / (range * std)));
  const F bias = splat(static_cast<float>((-args.low / range - args.mean[plane % args.channels]) / std));
  for (int64_t i = 0; i < count; ++i) {
    const Row<Type> out = image_row<Type>(args.out, plane, args.channels, first + i);
    for_vectors(0, args.out_width, [&](auto where) {
      out.store(where, read<Float32>(reinterpret_cast<const char *>(out_rows + i * out_row), where) * gain + bias);
    });
  }
}

// Bit j of byte k of a row: low <= x[8 k + j] <= high.
template <class Type>
void mark_inside(const Args &args, int64_t plane, int64_t y) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  constexpr int64_t kStaged = 512;
  const F low = splat(static_cast<float>(args.low)), high = splat(static_cast<float>(args.high));
  const Row<Type> row = image_row<Type>(args.image, plane, args.channels, y);
  uint8_t *byte = args.inside + (plane * args.height + y) * ((args.width + 7) / 8);
  uint8_t flags[kStaged + kLanes];
  for (int64_t x = 0; x < args.width; x += kStaged) {
    const int64_t count = args.width - x < kStaged ? args.width - x : kStaged;
    std::memset(flags + count / kLanes * kLanes, 0, kLanes);
    for_vectors(x, count, [&](auto where) {
      const F value = row.load(where);
      const F in = counted(where, (F)((value >= low) & (value <= high)));
      const Bytes one = __builtin_convertvector((I)in & 1, Bytes);
      std::memcpy(flags + (where.at - x), &one, sizeof one);
    });
    for (int64_t k = 0; k < count; k += 8) {
      uint64_t eight = 0;
      std::memcpy(&eight, flags + k, 8);
      if (count - k < 8) eight &= (uint64_t{1} << (8 * (count - k))) - 1;
      *byte++ = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);  // byte j's lowest bit to bit j
    }
  }
}

// The horizontal pass of the gradient for output rows [first, last): expanded[i - first][x].
template <class Type>
void expand_rows(const Args &args, const Space &space, int64_t plane, int64_t first, int64_t last, float *expanded,
                 float *columns) {
  const int64_t row = resize_padded(args.width), out_row = resize_padded(args.out_width);
  float *const staged = columns + kLanes * (row + out_row);
  for (int64_t i = first; i < last; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (i + lane >= last) break;  // those rows keep older values, whose columns are not used
      const Row<Type> grad = image_row<Type>(args.out, plane, args.channels, i + lane);
      char *const to = reinterpret_cast<char *>(staged + lane * out_row);
      for_vectors(0, args.out_width, [&](auto where) { write<Float32>(to, where, grad.load(where)); });
    }
    float *const wide = columns + kLanes * out_row;
    rows_to_columns(staged, out_row, args.out_width, columns);
    filter_columns(space.back_horizontal, columns, wide);
    columns_to_rows(wide, args.width, expanded + (i - first) * row, row);
  }
}

// The image rows [first, last) of a plane's gradient.
template <class Type>
void backward_rows(const Args &args, const Space &space, int64_t plane, int64_t first, int64_t last) {
  const Band &back = space.back_vertical;
  const int64_t row = resize_padded(args.width);
  const int64_t top = back.first[first], bottom = back.first[last - 1] + back.count[last - 1];
  float *const columns = space.of_thread();
  float *const expanded = columns + kLanes * (row + 2 * resize_padded(args.out_width));
  expand_rows<Type>(args, space, plane, top, bottom, expanded, columns);
  const F gain = splat(static_cast<float>(1. / ((args.high - args.low) * args.std[plane % args.channels])));
  I bit;
  for (int lane = 0; lane < kLanes; ++lane) bit[lane] = lane;
  for (int64_t y = first; y < last; ++y) {
    const Row<Type> grad = image_row<Type>(args.image, plane, args.channels, y);
    const uint8_t *const inside = args.inside + (plane * args.height + y) * ((args.width + 7) / 8);
    const float *const weight = back.weight + y * back.width;
    const char *const rows = reinterpret_cast<const char *>(expanded + (back.first[y] - top) * row);
    for_vectors(0, args.width, [&](auto where) {
      F total = {};
      for (int64_t j = 0; j < back.count[y]; ++j) total += weight[j] * read<Float32>(rows + j * row * 4, where);
      // The vector's bits start within a byte where it has four lanes.
      int32_t mask = inside[where.at / 8] >> (where.at % 8);
      if (kLanes > 8 && where.at + 8 < args.width) mask |= inside[where.at / 8 + 1] << 8;
      const I on = ((I{} + mask) >> bit) & 1;
      grad.store(where, select(on != 0, total * gain, F{}));
    });
  }
}

}  // namespace

void preprocess_reward_fwd(const Args &args) {
  const int64_t planes = args.batch * args.channels, blocks = (args.out_height + kLanes - 1) / kLanes;
  if (planes * args.width * args.height == 0) return;
  const Space space(args, false);
  const int64_t elements = planes * args.width * args.height;
  with_common_type({&args.image, &args.out}, [&](auto type) {
    for_items(planes * blocks, elements, args.num_threads,
              [&](int64_t item) { forward_rows<decltype(type)>(args, space, item / blocks, item % blocks * kLanes); });
    if (args.inside != nullptr)
      for_items(planes * args.height, elements, args.num_threads,
                [&](int64_t item) { mark_inside<decltype(type)>(args, item / args.height, item % args.height); });
  });
}

void preprocess_reward_bwd(const Args &args) {
  const int64_t planes = args.batch * args.channels;
  if (planes * args.width * args.height == 0) return;
  const Space space(args, true);
  // Few planes are cut into bands of rows; each row's value is the same in any band.
  const int64_t bands = planes >= args.num_threads ? 1 : (args.num_threads + planes - 1) / planes;
  with_common_type({&args.image, &args.out}, [&](auto type) {
    for_items(planes * bands, planes * args.width * args.height, args.num_threads, [&](int64_t item) {
      const int64_t band = item % bands, first = band * args.height / bands, last = (band + 1) * args.height / bands;
      if (first < last) backward_rows<decltype(type)>(args, space, item / bands, first, last);
    });
  });
}

inline dmdr_status check(const dmdr_preprocess_reward_args &args) {
  if (has_bad_dtype({args.image, args.out})) return DMDR_ERROR_DTYPE;
  const bool bad = args.batch < 0 || args.channels < 0 || args.height < 0 || args.width < 0 || args.out_height <= 0 ||
                   args.out_width <= 0 || args.num_threads < 1;
  return bad ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

#if defined(DMDR_EXPORTS)
int64_t dmdr_preprocess_reward_workspace(int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                         int64_t antialias, int64_t num_threads) {
  using namespace dmdr;
  const int64_t bands = band_words(out_height, filter_width(height, out_height, antialias)) +
                        band_words(out_width, filter_width(width, out_width, antialias)) +
                        band_words(height, transposed_width(height, out_height, antialias)) +
                        band_words(width, transposed_width(width, out_width, antialias));
  return bands + (num_threads * resize_scratch(width, out_height, out_width) + 1) / 2;
}
#endif

DMDR_ENTRY(preprocess_reward_fwd, dmdr_preprocess_reward_args)
DMDR_ENTRY(preprocess_reward_bwd, dmdr_preprocess_reward_args)
