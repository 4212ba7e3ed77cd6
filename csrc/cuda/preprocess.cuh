// What both directions of preprocess_reward share. An image [batch, channels, height, width] is worked on in planes;
// every thread owns eight neighbouring columns: one 16-byte access in a 16-bit type, and one byte of `inside`.
#pragma once

#include "resize.cuh"

namespace dmdr {

constexpr int kColumns = 8;
constexpr int kMostImageThreads = 128;
constexpr int kMostChannels = 32;
constexpr int64_t kMostSharedImage = 200 << 10;

// (resize(clamp(x)) - low) / (high - low), minus mean, over std is gain resize(clamp(x)) + bias: weights sum to 1.
struct ChannelMaps {
  float gain[kMostChannels], bias[kMostChannels];
};

struct ImageParams {
  dmdr_tensor image, out;
  uint8_t *inside;
  int64_t inside_stride;    // bytes of a row
  Resize vertical, horizontal;  // from image to out
  ChannelMaps maps;
  float low, high;
  int channels;
  int tile, tiles;          // columns that a block writes, and blocks side by side
  int strip, strips;        // rows that a block writes, and blocks one below the other
  int taps, row_taps;       // weights of a column's and of a row's filter
  int line;                 // floats of a row in shared memory
  bool aligned;

  ImageParams(const Resize &vertical, const Resize &horizontal) : vertical(vertical), horizontal(horizontal) {}
};

DMDR_DEVICE int64_t plane_offset(const dmdr_tensor &image, int64_t plane, int channels) {
  return plane / channels * image.stride[0] + plane % channels * image.stride[1];
}

// Eight columns from `column` on, of rows `width` wide.
DMDR_DEVICE Extent columns_from(int column, int width, bool aligned) {
  const int left = width - column;
  return {left < 0 ? 0 : left < kColumns ? left : kColumns, aligned};
}

inline int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int round_down(int x, int multiple) { return x / multiple * multiple; }

// Threads with eight columns each for so many columns.
inline int image_threads(int columns) {
  const int threads = round_up((columns + kColumns - 1) / kColumns, kWarp);
  return threads < kMostImageThreads ? threads : kMostImageThreads;
}

constexpr int64_t kManyPlanes = 1 << 20;

// Rows to a block: tall ones read less twice, small ones keep a large GPU busy.
inline int strip_rows(int64_t blocks_side_by_side, int rows, int smallest) {
  constexpr int64_t kBlocksWorthHaving = 256;
  int strip = 4 * smallest;
  while (strip > smallest && blocks_side_by_side * ceil_div(rows, strip) < kBlocksWorthHaving) strip /= 2;
  return strip;
}

// Can a block's tables of weights be held in shared memory, however many images there are?
bool forward_fits(const Resize &vertical, const Resize &horizontal);
bool backward_fits(const Resize &vertical, const Resize &horizontal);

// fn(Type(), params) with everything set that does not depend on the direction.
template <class Fn>
int with_image(const dmdr_preprocess_reward_args &args, Fn fn) {
  if (!known_dtypes({&args.image, &args.out})) return DMDR_ERROR_DTYPE;
  for (const int64_t size : {args.height, args.width, args.out_height, args.out_width})
    if (size <= 0 || size > (1 << 20)) return DMDR_ERROR_ARGUMENT;
  if (args.batch < 0 || args.channels <= 0 || args.channels > kMostChannels) return DMDR_ERROR_ARGUMENT;
  if (args.batch == 0) return DMDR_OK;
  const bool antialias = args.antialias != 0;
  ImageParams params(Resize(args.height, args.out_height, antialias), Resize(args.width, args.out_width, antialias));
  params.image = args.image;
  params.out = args.out;
  params.inside = args.inside;
  params.inside_stride = ceil_div(args.width, 8);
  params.low = static_cast<float>(args.low);
  params.high = static_cast<float>(args.high);
  params.channels = static_cast<int>(args.channels);
  const double range = args.high - args.low;
  for (int c = 0; c < args.channels; ++c) {
    params.maps.gain[c] = static_cast<float>(1. / (range * args.std[c]));
    if (args.mean != nullptr)
      params.maps.bias[c] = static_cast<float>((-args.low / range - args.mean[c]) / args.std[c]);
  }
  const int64_t image_sizes[] = {args.batch, args.channels, args.height};
  const int64_t out_sizes[] = {args.batch, args.channels, args.out_height};
  params.aligned = all_aligned({&args.image}, image_sizes, 3) && all_aligned({&args.out}, out_sizes, 3);
  const bool whole = params.aligned && args.width % kColumns == 0 && args.out_width % kColumns == 0;
  return with_type(common_dtype({&args.image, &args.out}), whole, [&](auto type) { return fn(type, params); });
}

}  // namespace dmdr
