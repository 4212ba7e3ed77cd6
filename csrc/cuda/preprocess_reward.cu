// preprocess_reward: out = (resize((clamp(x) - low) / (high - low)) - mean) / std.
//
// A block makes some rows of out: columns first, then rows. Shrinking with antialiasing, an image row lies in the filters
// of at most five output rows: a thread streams down its eight columns, reads each row once and keeps five sums; a
// finished one goes to shared memory as a line. Otherwise a filter has at most five rows, and each output row gathers its
// own. Then every thread filters lines horizontally into eight neighbouring outputs.
#include "preprocess.cuh"

namespace dmdr {
namespace {

constexpr int kOpen = 5;   // output rows whose filters can cover one image row
constexpr int kAhead = 4;  // image rows on their way
constexpr int kFlush = 3;  // lines that are worth a horizontal pass
// Before a step of kAhead rows fewer than kFlush lines wait; each row finishes one, the last of the image three.
constexpr int kLines = kFlush - 1 + kAhead + 2;

// One image row of a strip: its weights in the filters that are open, how many are, how many it completes.
struct alignas(16) RowStep {
  float weight[kOpen];
  int open, completes, unused;
};

// Where things lie in shared memory, in floats.
struct Space {
  int first, end_column, weight;       // [tile], [tile], [taps][tile]
  int row_first, row_end, row_weight;  // [strip], [strip], [strip][row_taps]
  int steps;                           // [image rows of a strip]
  int lines, size;                     // [kLines][line]
};

struct ForwardParams {
  ImageParams image;
  Space space;
};

template <class Type, bool kStreams>
class Strip {
 public:
  DMDR_DEVICE Strip(const ImageParams &p, const Space &space, float *shared)
      : p_(p), space_(space), shared_(shared), plane_(blockIdx.x / p.tiles / p.strips) {
    const int tile = static_cast<int>(blockIdx.x) % p.tiles, strip = static_cast<int>(blockIdx.x) / p.tiles % p.strips;
    x0_ = tile * p.tile;
    columns_ = min_of(p.tile, p.horizontal.size_out - x0_);
    y0_ = strip * p.strip;
    rows_ = min_of(p.strip, p.vertical.size_out - y0_);
    own_rows_ = {owned(p.vertical, strip, p.strip, p.strips), owned(p.vertical, strip + 1, p.strip, p.strips)};
    own_columns_ = {round_to(owned(p.horizontal, tile, p.tile, p.tiles)),
                    round_to(owned(p.horizontal, tile + 1, p.tile, p.tiles))};
    if (tile + 1 == p.tiles) own_columns_.end = p.horizontal.size_in;
    from_ = plane_offset(p.image, plane_, p.channels);
  }

  DMDR_DEVICE void run() {
    make_filters();
    __syncthreads();
    base_ = integers(space_.first)[0] / kColumns * kColumns;
    column_ = base_ + static_cast<int>(threadIdx.x) * kColumns;
    if constexpr (kStreams) {
      make_steps();
      __syncthreads();
      stream();
    } else {
      gather();
      if (p_.inside != nullptr) mark_owned();
    }
  }

 private:
  static DMDR_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
  static DMDR_DEVICE int round_to(int column) { return column / kColumns * kColumns; }
  // The first input that belongs to part i of the outputs: every input belongs to one part.
  static DMDR_DEVICE int owned(const Resize &resize, int part, int size, int parts) {
    if (part >= parts) return resize.size_in;
    return min_of(static_cast<int>(resize.scale * static_cast<float>(part * size)), resize.size_in);
  }
  DMDR_DEVICE int *integers(int at) const { return reinterpret_cast<int *>(shared_ + at); }
  DMDR_DEVICE RowStep *steps() const { return reinterpret_cast<RowStep *>(shared_ + space_.steps); }
  DMDR_DEVICE float *line(int i) const { return shared_ + space_.lines + i * p_.line; }

  // A thread per filter, columns and then rows.
  DMDR_DEVICE void make_filters() const {
#pragma unroll 1
    for (int i = threadIdx.x; i < columns_ + rows_; i += blockDim.x) {
      const bool is_column = i < columns_;
      const int at = is_column ? i : i - columns_;
      const Resize resize = is_column ? p_.horizontal : p_.vertical;
      const Filter filter(resize, (is_column ? x0_ : y0_) + at);
      const Window window = filter.window();
      integers(is_column ? space_.first : space_.row_first)[at] = window.first;
      integers(is_column ? space_.end_column : space_.row_end)[at] = window.end;
      float *const weight = shared_ + (is_column ? space_.weight + at : space_.row_weight + at * p_.row_taps);
      const int stride = is_column ? p_.tile : 1;
      float total = 0.f;
#pragma unroll 2
      for (int k = 0; k < window.end - window.first; ++k) {
        const float raw = filter.raw(window.first + k);
        weight[k * stride] = raw;
        total += raw;
      }
      if (!resize.antialias || total == 0.f) continue;
#pragma unroll 2
      for (int k = 0; k < window.end - window.first; ++k) weight[k * stride] /= total;
    }
  }

  DMDR_DEVICE int image_rows() const {
    return integers(space_.row_end)[rows_ - 1] - integers(space_.row_first)[0];
  }

  // A thread per image row: windows begin and end in order, so the open filters are neighbours.
  DMDR_DEVICE void make_steps() const {
    const int *const first = integers(space_.row_first), *const end = integers(space_.row_end);
    for (int i = threadIdx.x; i < image_rows(); i += blockDim.x) {
      const int row = first[0] + i;
      int done = 0;
      RowStep step = {};
      while (done < rows_ && end[done] <= row) ++done;
      for (int y = done; y < rows_ && end[y] == row + 1; ++y) ++step.completes;
#pragma unroll
      for (int k = 0; k < kOpen; ++k) {
        const int y = done + k;
        if (y >= rows_ || first[y] > row) continue;
        step.weight[k] = shared_[space_.row_weight + y * p_.row_taps + row - first[y]];
        step.open = k + 1;
      }
      steps()[i] = step;
    }
  }

  // Threads beyond the image read its last columns, which is cheaper than a branch; nobody reads their lines.
  DMDR_DEVICE int64_t offset(int row) const {
    const int last = p_.horizontal.size_in - kColumns;
    return from_ + row * p_.image.stride[2] + (Type::kFixed && column_ > last ? last : column_);
  }
  DMDR_DEVICE Vector<Type, kColumns> load(int64_t offset) const {
    const Extent extent = columns_from(column_, p_.horizontal.size_in, p_.aligned);
    if (!Type::kFixed && extent.count == 0) return Vector<Type, kColumns>::zero();
    return Vector<Type, kColumns>::load(p_.image, offset, extent);
  }

  // x limited to [low, high]; bit j: it was inside.
  DMDR_DEVICE uint32_t clamp(float (&x)[kColumns]) const {
    uint32_t inside = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float clamped = clamp_nan(x[j], p_.low, p_.high);
      if (clamped == x[j]) inside |= 1u << j;
      x[j] = clamped;
    }
    return inside;
  }

  DMDR_DEVICE void mark(int row, int column, uint32_t inside) const {
    const Extent extent = columns_from(column, p_.horizontal.size_in, p_.aligned);
    p_.inside[(static_cast<int64_t>(plane_) * p_.vertical.size_in + row) * p_.inside_stride + column / kColumns] =
        static_cast<uint8_t>(inside & ((1u << extent.count) - 1u));
  }

  DMDR_DEVICE void set_line(int i, const float (&x)[kColumns]) const {
    const int at = column_ - base_;
    if (at >= p_.line) return;
    float4 *const to = reinterpret_cast<float4 *>(line(i) + at);
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
  }

  DMDR_DEVICE void stream() {
    float sum[kOpen][kColumns];
#pragma unroll
    for (int k = 0; k < kOpen; ++k)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[k][j] = 0.f;
    const int top = integers(space_.row_first)[0], rows = image_rows();
    const bool marks = p_.inside != nullptr && column_ >= own_columns_.first && column_ < own_columns_.end;
    int waiting = 0, next_out = y0_;
    Vector<Type, kColumns> ahead[kAhead];
    int64_t next = load_ahead(offset(top), rows, ahead);
#pragma unroll 1
    for (int i = 0; i < rows; i += kAhead) {
      Vector<Type, kColumns> now[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) now[k] = ahead[k];
      next = load_ahead(next, rows - i - kAhead, ahead);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (i + k >= rows) continue;
        float x[kColumns];
        now[k].get(x);
        const uint32_t inside = clamp(x);
        const int row = top + i + k;
        if (marks && row >= own_rows_.first && row < own_rows_.end) mark(row, column_, inside);
        waiting = add_row(steps()[i + k], x, sum, waiting);
      }
      if (waiting >= kFlush || i + kAhead >= rows) {
        filter_lines(next_out, waiting);
        next_out += waiting;
        waiting = 0;
      }
    }
  }

  // The next rows, of which `left` are left; where the one after them is.
  DMDR_DEVICE int64_t load_ahead(int64_t offset, int left, Vector<Type, kColumns> (&ahead)[kAhead]) const {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k < left) ahead[k] = load(offset);
      offset += p_.image.stride[2];
    }
    return offset;
  }

  // Adds a row to the open sums and moves those it completes to lines.
  DMDR_DEVICE int add_row(const RowStep &shared_step, const float (&x)[kColumns], float (&sum)[kOpen][kColumns],
                          int waiting) const {
    const RowStep step = shared_step;
#pragma unroll
    for (int k = 0; k < kOpen; ++k) {
      if (k >= step.open) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[k][j] += step.weight[k] * x[j];
    }
#pragma unroll 1
    for (int done = 0; done < step.completes; ++done) {
      set_line(waiting++, sum[0]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int k = 0; k + 1 < kOpen; ++k) sum[k][j] = sum[k + 1][j];
        sum[kOpen - 1][j] = 0.f;
      }
    }
    return waiting;
  }

  DMDR_DEVICE void gather() {
#pragma unroll 1
    for (int y = 0; y < rows_; y += kAhead) {
      const int count = min_of(kAhead, rows_ - y);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        float sum[kColumns] = {};
        const int first = integers(space_.row_first)[y + i], end = integers(space_.row_end)[y + i];
        const float *const weight = shared_ + space_.row_weight + (y + i) * p_.row_taps;
#pragma unroll 1
        for (int row = first; row < end; ++row) {
          float x[kColumns];
          load(offset(row)).get(x);
          clamp(x);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sum[j] += weight[row - first] * x[j];
        }
        set_line(i, sum);
      }
      filter_lines(y0_ + y, count);
    }
  }

  DMDR_DEVICE void mark_owned() {
#pragma unroll 1
    for (int row = own_rows_.first; row < own_rows_.end; ++row) {
#pragma unroll 1
      for (int column = own_columns_.first + static_cast<int>(threadIdx.x) * kColumns; column < own_columns_.end;
           column += static_cast<int>(blockDim.x) * kColumns) {
        column_ = column;
        float x[kColumns];
        load(offset(row)).get(x);
        mark(row, column, clamp(x));
      }
    }
  }

  // Lines 0 .. count - 1 to the output rows from y on, eight outputs at a time.
  DMDR_DEVICE void filter_lines(int y, int count) const {
    const int groups = (columns_ + kColumns - 1) / kColumns;
    const int channel = static_cast<int>(plane_ % p_.channels);
    const float gain = p_.maps.gain[channel], bias = p_.maps.bias[channel];
    const int64_t to = plane_offset(p_.out, plane_, p_.channels) + x0_;
    __syncthreads();
#pragma unroll 1
    for (int item = threadIdx.x; item < count * groups; item += blockDim.x) {
      const int row = item / groups, x = item % groups * kColumns;
      float sum[kColumns];
      filter_group(line(row) - base_, x, sum);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[j] = sum[j] * gain + bias;
      Vector<Type, kColumns>::store(p_.out, to + (y + row) * p_.out.stride[2] + x, sum,
                                    columns_from(x, columns_, p_.aligned));
    }
    __syncthreads();
  }

  // Nothing outside a filter is touched: a NaN stays where the formula has it.
  DMDR_DEVICE void filter_group(const float *line, int x, float (&sum)[kColumns]) const {
    const int *const first = integers(space_.first) + x, *const end = integers(space_.end_column) + x;
    const float *from[kColumns];
    int taps[kColumns], most = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      sum[j] = 0.f;
      const bool exists = x + j < columns_;
      from[j] = line + (exists ? first[j] : base_);
      taps[j] = exists ? end[j] - first[j] : 0;
      most = taps[j] > most ? taps[j] : most;
    }
#pragma unroll 1
    for (int k = 0; k < most; ++k) {
      const float4 *const weights = reinterpret_cast<const float4 *>(shared_ + space_.weight + k * p_.tile + x);
      const float4 low = weights[0], high = weights[1];
      const float weight[kColumns] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (k < taps[j]) sum[j] += weight[j] * from[j][k];
    }
  }

  const ImageParams &p_;
  const Space &space_;
  float *const shared_;
  const uint32_t plane_;
  int x0_, y0_, columns_, rows_;  // of out
  Window own_rows_, own_columns_;
  int64_t from_;
  int base_, column_;             // the tile's first image column, this thread's
};

// Blocks that a multiprocessor's registers hold: the open sums and the rows on their way take 128 and more.
template <bool kStreams>
constexpr int kImageBlocks = kStreams ? 3 : 4;

template <class Type, bool kStreams>
__global__ void __launch_bounds__(kMostImageThreads, kImageBlocks<kStreams>) image_forward_kernel(const __grid_constant__ ForwardParams p) {
  Strip<Type, kStreams>(p.image, p.space, shared_memory<float>()).run();
}

bool streams(const ImageParams &p) { return p.vertical.antialias && p.vertical.scale >= 1.f; }

Space make_space(const ImageParams &p, bool streams) {
  Space space = {};
  int at = 0;
  const auto take = [&at](int floats) {
    const int start = at;
    at = round_up(at + floats, 4);
    return start;
  };
  space.first = take(p.tile);
  space.end_column = take(p.tile);
  space.weight = take(p.taps * p.tile);
  space.row_first = take(p.strip);
  space.row_end = take(p.strip);
  space.row_weight = take(p.strip * p.row_taps);
  const int steps = streams ? p.vertical.most_inputs(p.strip) : 0;
  space.steps = take(steps * static_cast<int>(sizeof(RowStep) / sizeof(float)));
  space.lines = take(kLines * p.line);
  space.size = at;
  return space;
}

// Fewest blocks side by side whose image columns the threads of a block can own.
bool cut(ImageParams &p, int *threads) {
  const int width = p.horizontal.size_out;
  for (p.tiles = 1;; ++p.tiles) {
    p.tile = round_up(static_cast<int>(ceil_div(width, p.tiles)), kColumns);
    const int reach = p.horizontal.most_inputs(p.tile) + kColumns - 1;
    const int columns = round_up(reach < p.horizontal.size_in ? reach : p.horizontal.size_in, kColumns);
    *threads = image_threads(columns);
    p.line = *threads * kColumns;
    if (columns <= p.line && p.tile <= 1024) break;
    if (p.tile == kColumns) return false;
  }
  p.tiles = static_cast<int>(ceil_div(width, p.tile));
  return true;
}

// Everything that says how the work is cut; false if a block cannot hold its tables.
bool plan(ForwardParams &params, int64_t planes, int *threads) {
  ImageParams &p = params.image;
  if (!cut(p, threads)) return false;
  p.strip = strip_rows(planes * p.tiles, p.vertical.size_out, 8);
  p.strips = static_cast<int>(ceil_div(p.vertical.size_out, p.strip));
  p.taps = p.horizontal.most_taps();
  p.row_taps = p.vertical.most_taps();
  params.space = make_space(p, streams(p));
  return params.space.size <= kMostSharedImage / static_cast<int64_t>(sizeof(float));
}

}  // namespace

bool forward_fits(const Resize &vertical, const Resize &horizontal) {
  ForwardParams params = {ImageParams(vertical, horizontal), {}};
  int threads = 0;
  return plan(params, kManyPlanes, &threads);
}

}  // namespace dmdr

using namespace dmdr;

extern "C" {

int64_t dmdr_preprocess_reward_workspace(int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                         int64_t antialias, int64_t) {
  const Resize vertical(height, out_height, antialias != 0), horizontal(width, out_width, antialias != 0);
  return forward_fits(vertical, horizontal) && backward_fits(vertical, horizontal) ? 0 : -1;
}

int dmdr_preprocess_reward_fwd(const dmdr_preprocess_reward_args *args, void *stream) {
  if (wrong_size(args)) return DMDR_ERROR_STRUCT_SIZE;
  if (args->mean == nullptr || args->std == nullptr) return DMDR_ERROR_ARGUMENT;
  return with_image(*args, [&](auto type, const ImageParams &image) {
    using Type = decltype(type);
    ForwardParams params = {image, {}};
    int threads = 0;
    const int64_t planes = args->batch * args->channels;
    if (!plan(params, planes, &threads)) return static_cast<int>(DMDR_ERROR_ARGUMENT);
    const Grid grid = {planes * params.image.tiles * params.image.strips, threads, params.space.size * sizeof(float)};
    return launch(streams(image) ? image_forward_kernel<Type, true> : image_forward_kernel<Type, false>, grid, stream, params);
  });
}

}  // extern "C"
