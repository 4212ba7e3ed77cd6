// The gradient of preprocess_reward: V^T grad H of the two resizing matrices, 0 where the clamp had cut off. Every image
// pixel gathers from the outputs whose filters cover it, so nothing is added with atomics.
//
// A block makes some rows of the image: for four of them at a time it first combines rows of grad into lines in shared
// memory, then every thread filters lines horizontally into its eight columns.
#include "preprocess.cuh"

namespace dmdr {
namespace {

constexpr int kRows = 4;  // image rows that are worked on together

// Where things lie in shared memory, in floats.
struct Space {
  int first, end, total;               // [outputs]: windows of the output columns that the block reads
  int group, weight;                   // [threads], [taps][line]: the first output of a thread's columns, its weights
  int row_first, row_end, row_total;   // [output rows]
  int row_group, row_weight;           // [strip], [strip][row_taps]
  int lines, size;                     // [kRows][reach]
};

struct BackwardParams {
  ImageParams image;
  Space space;
  int outputs, output_rows;  // most windows that a block needs
  int reach;                 // floats of a line
};

template <class Type>
class ImageStrip {
 public:
  DMDR_DEVICE ImageStrip(const BackwardParams &params, float *shared)
      : params_(params), p_(params.image), space_(params.space), shared_(shared),
        plane_(blockIdx.x / p_.tiles / p_.strips), column_(0) {
    const int tile = static_cast<int>(blockIdx.x) % p_.tiles, strip = static_cast<int>(blockIdx.x) / p_.tiles % p_.strips;
    x0_ = tile * p_.tile;
    columns_ = min_of(p_.tile, p_.horizontal.size_in - x0_);
    y0_ = strip * p_.strip;
    rows_ = min_of(p_.strip, p_.vertical.size_in - y0_);
    column_ = x0_ + static_cast<int>(threadIdx.x) * kColumns;
  }

  DMDR_DEVICE void run() {
    out_x_ = earliest(p_.horizontal, x0_) / kColumns * kColumns;
    out_y_ = earliest(p_.vertical, y0_);
    make_windows();
    __syncthreads();
    make_columns();
    make_rows();
    __syncthreads();
#pragma unroll 1
    for (int y = 0; y < rows_; y += kRows) {
      combine_rows(y);
      __syncthreads();
      write_rows(y);
      __syncthreads();
    }
  }

 private:
  static DMDR_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
  DMDR_DEVICE int *integers(int at) const { return reinterpret_cast<int *>(shared_ + at); }
  DMDR_DEVICE float *line(int i) const { return shared_ + space_.lines + i * params_.reach; }

  // An output at or before the first one whose filter covers an input.
  static DMDR_DEVICE int earliest(const Resize &resize, int input) {
    const float output = (static_cast<float>(input) - resize.support) / resize.scale - 2.f;
    return output > 0.f ? static_cast<int>(output) : 0;
  }

  // A thread per filter: where its window is and what its weights are divided by.
  DMDR_DEVICE void make_windows() const {
    const int outputs = min_of(params_.outputs, p_.horizontal.size_out - out_x_);
    const int output_rows = min_of(params_.output_rows, p_.vertical.size_out - out_y_);
#pragma unroll 1
    for (int i = threadIdx.x; i < outputs + output_rows; i += blockDim.x) {
      const bool is_column = i < outputs;
      const int at = is_column ? i : i - outputs;
      const Resize resize = is_column ? p_.horizontal : p_.vertical;
      const Filter filter(resize, (is_column ? out_x_ : out_y_) + at);
      integers(is_column ? space_.first : space_.row_first)[at] = filter.window().first;
      integers(is_column ? space_.end : space_.row_end)[at] = filter.window().end;
      shared_[(is_column ? space_.total : space_.row_total) + at] = filter.total();
    }
  }

  // The first window, of `count` in order, that ends behind an input.
  DMDR_DEVICE int first_covering(int ends, int count, int input) const {
    int i = 0;
    while (i + 1 < count && integers(ends)[i] <= input) ++i;
    return i;
  }

  DMDR_DEVICE float weight(const Resize &resize, int output, int first, int end, float total, int input) const {
    return input < first || input >= end ? 0.f : Filter(resize, output).raw(input) / total;
  }

  // The weights of this thread's columns in the outputs from its first one on; 0 where a filter does not reach.
  DMDR_DEVICE void make_columns() const {
    const int outputs = min_of(params_.outputs, p_.horizontal.size_out - out_x_);
    const int start = first_covering(space_.end, outputs, column_);
    integers(space_.group)[threadIdx.x] = start;
#pragma unroll 1
    for (int k = 0; k < p_.taps; ++k) {
      const int at = start + k;
      float *const to = shared_ + space_.weight + k * p_.line + static_cast<int>(threadIdx.x) * kColumns;
#pragma unroll 1
      for (int j = 0; j < kColumns; ++j)
        to[j] = at >= outputs ? 0.f
                              : weight(p_.horizontal, out_x_ + at, integers(space_.first)[at], integers(space_.end)[at],
                                       shared_[space_.total + at], column_ + j);
    }
  }

  DMDR_DEVICE void make_rows() const {
    const int outputs = min_of(params_.output_rows, p_.vertical.size_out - out_y_);
#pragma unroll 1
    for (int i = threadIdx.x; i < rows_ * p_.row_taps; i += blockDim.x) {
      const int y = i / p_.row_taps, k = i % p_.row_taps;
      const int start = first_covering(space_.row_end, outputs, y0_ + y), at = start + k;
      if (k == 0) integers(space_.row_group)[y] = start;
      shared_[space_.row_weight + i] =
          at >= outputs ? 0.f
                        : weight(p_.vertical, out_y_ + at, integers(space_.row_first)[at], integers(space_.row_end)[at],
                                 shared_[space_.row_total + at], y0_ + y);
    }
  }

  // lines[i][x] = gain sum_k row_weight[y + i][k] grad[k][x]
  DMDR_DEVICE void combine_rows(int y) const {
    const int outputs = min_of(params_.outputs, p_.horizontal.size_out - out_x_);
    const int groups = (outputs + kColumns - 1) / kColumns, count = min_of(kRows, rows_ - y);
    const float gain = p_.maps.gain[plane_ % p_.channels];
    const int64_t from = plane_offset(p_.out, plane_, p_.channels);
#pragma unroll 1
    for (int item = threadIdx.x; item < count * groups; item += blockDim.x) {
      const int i = item / groups, x = item % groups * kColumns, row = y + i;
      const Extent extent = columns_from(out_x_ + x, p_.horizontal.size_out, p_.aligned);
      const int start = integers(space_.row_group)[row];
      const int taps = min_of(p_.row_taps, p_.vertical.size_out - out_y_ - start);
      float sum[kColumns] = {};
#pragma unroll 4
      for (int k = 0; k < taps; ++k) {
        const float weight = shared_[space_.row_weight + row * p_.row_taps + k];
        const int64_t at = from + (out_y_ + start + k) * p_.out.stride[2] + out_x_ + x;
        float grad[kColumns];
        Vector<Type, kColumns>::load(p_.out, at, extent).get(grad);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[j] += weight * grad[j];
      }
      float4 *const to = reinterpret_cast<float4 *>(line(i) + x);
      to[0] = make_float4(gain * sum[0], gain * sum[1], gain * sum[2], gain * sum[3]);
      to[1] = make_float4(gain * sum[4], gain * sum[5], gain * sum[6], gain * sum[7]);
    }
  }

  // This thread's columns of rows y .. y + kRows - 1.
  DMDR_DEVICE void write_rows(int y) const {
    const Extent extent = columns_from(column_, x0_ + columns_, p_.aligned);
    if (extent.count == 0) return;
    uint32_t inside[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (y + i < rows_) inside[i] = load_inside(y0_ + y + i);
    const int start = integers(space_.group)[threadIdx.x];
    float sum[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = 0.f;
    const int taps = min_of(p_.taps, p_.horizontal.size_out - out_x_ - start);
#pragma unroll 2
    for (int k = 0; k < taps; ++k) {
      const float4 *const weights = reinterpret_cast<const float4 *>(shared_ + space_.weight + k * p_.line +
                                                                     static_cast<int>(threadIdx.x) * kColumns);
      const float4 low = weights[0], high = weights[1];
      const float weight[kColumns] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float value = line(i)[start + k];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] += weight[j] * value;
      }
    }
    const int64_t to = plane_offset(p_.image, plane_, p_.channels) + column_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (y + i >= rows_) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = (inside[i] >> j & 1u) != 0 ? sum[i][j] : 0.f;
      Vector<Type, kColumns>::store(p_.image, to + (y0_ + y + i) * p_.image.stride[2], sum[i], extent);
    }
  }

  DMDR_DEVICE uint32_t load_inside(int row) const {
    return p_.inside[(static_cast<int64_t>(plane_) * p_.vertical.size_in + row) * p_.inside_stride + column_ / kColumns];
  }

  const BackwardParams &params_;
  const ImageParams &p_;
  const Space &space_;
  float *const shared_;
  const uint32_t plane_;
  int x0_, y0_, columns_, rows_;  // of the image
  int out_x_, out_y_;             // first output column and row that the block looks at
  int column_;                    // this thread's first
};

template <class Type>
__global__ void __launch_bounds__(kMostImageThreads, 4) image_backward_kernel(const __grid_constant__ BackwardParams p) {
  ImageStrip<Type>(p, shared_memory<float>()).run();
}

Space make_space(const BackwardParams &params, int threads) {
  const ImageParams &p = params.image;
  Space space = {};
  int at = 0;
  const auto take = [&at](int floats) {
    const int start = at;
    at = round_up(at + floats, 4);
    return start;
  };
  space.first = take(params.outputs);
  space.end = take(params.outputs);
  space.total = take(params.outputs);
  space.group = take(threads);
  space.weight = take(p.taps * p.line);
  space.row_first = take(params.output_rows);
  space.row_end = take(params.output_rows);
  space.row_total = take(params.output_rows);
  space.row_group = take(p.strip);
  space.row_weight = take(p.strip * p.row_taps);
  space.lines = take(kRows * params.reach);
  space.size = at;
  return space;
}

// Threads to a block: as many as the image is wide, fewer where enlarging makes the tables of weights large.
bool plan(BackwardParams &params, int64_t planes, int *threads) {
  constexpr int kPreferredTable = 64 << 10;
  ImageParams &p = params.image;
  p.taps = p.horizontal.most_outputs(kColumns);
  *threads = image_threads(p.horizontal.size_in);
  while (*threads > kWarp && p.taps * *threads * kColumns * 4 > kPreferredTable) *threads -= kWarp;
  p.line = p.tile = *threads * kColumns;
  p.tiles = static_cast<int>(ceil_div(p.horizontal.size_in, p.tile));
  p.strip = strip_rows(planes * p.tiles, p.vertical.size_in, 16);
  p.strips = static_cast<int>(ceil_div(p.vertical.size_in, p.strip));
  p.row_taps = p.vertical.most_outputs(1);
  // `earliest` may be three outputs early, and columns start at a multiple of eight.
  params.outputs = p.horizontal.most_outputs(p.tile) + 3 + kColumns;
  params.output_rows = p.vertical.most_outputs(p.strip) + 3;
  params.reach = round_up(params.outputs, kColumns);
  params.space = make_space(params, *threads);
  return params.space.size <= kMostSharedImage / static_cast<int64_t>(sizeof(float));
}

}  // namespace

bool backward_fits(const Resize &vertical, const Resize &horizontal) {
  BackwardParams params = {ImageParams(vertical, horizontal), {}, 0, 0, 0};
  int threads = 0;
  return plan(params, kManyPlanes, &threads);
}

}  // namespace dmdr

using namespace dmdr;

extern "C" int dmdr_preprocess_reward_bwd(const dmdr_preprocess_reward_args *args, void *stream) {
  if (wrong_size(args)) return DMDR_ERROR_STRUCT_SIZE;
  if ((args->inside == nullptr && args->batch > 0) || args->std == nullptr) return DMDR_ERROR_ARGUMENT;
  return with_image(*args, [&](auto type, const ImageParams &image) {
    BackwardParams params = {image, {}, 0, 0, 0};
    int threads = 0;
    const int64_t planes = args->batch * args->channels;
    if (!plan(params, planes, &threads)) return static_cast<int>(DMDR_ERROR_ARGUMENT);
    const Grid grid = {planes * params.image.tiles * params.image.strips, threads, params.space.size * sizeof(float)};
    return launch(image_backward_kernel<decltype(type)>, grid, stream, params);
  });
}
