// The gradients of layer_norm_modulate. A block walks down some rows of a sample and keeps the sums for shift and scale
// in registers; a second kernel adds the blocks' sums in block order. Memory sees 6 bytes per element in bf16.
#include "norm.cuh"

namespace dmdr {
namespace {

// Columns of a thread: their sums, two rows and a scale take 72 registers in bf16.
constexpr int kColumns = 16;

// Rows that a block adds up: about 512 blocks in all, four to a multiprocessor of a large GPU.
int64_t block_rows(int64_t batch, int64_t rows) { return std::max<int64_t>(4, ceil_div(batch * rows, 512)); }

struct RowSums {
  float along, across;
};
struct AddSums {
  DMDR_DEVICE RowSums operator()(const RowSums &a, const RowSums &b) const {
    return {a.along + b.along, a.across + b.across};
  }
};

// Two sets, so that one barrier per row is enough: a set is written again only after the next row's barrier.
struct NormShared {
  BlockSpace<RowSums> sums[2];
};

template <class Type, int kThreads>
class BlockRows {
 public:
  using Share = RowShare<Type, kThreads, kColumns>;
  static constexpr int kWidth = Type::kWidth, kVectors = Share::kVectors;
  // Any's vectors are floats: two rows of them would not fit in registers.
  static constexpr bool kLoadsAhead = Type::kFixed;

  DMDR_DEVICE BlockRows(const NormParams &p, NormShared &shared)
      : p_(p), args_(p.args), shared_(shared), share_{p.features, threadIdx.x, p.aligned},
        sample_(blockIdx.x / p.blocks_per_sample), sums_rows_(p.args.gather > DMDR_GATHER_PER_ROW) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) shift_sum_[v][j] = scale_sum_[v][j] = 0.f;
  }

  DMDR_DEVICE void run() {
    const uint32_t first = blockIdx.x % p_.blocks_per_sample * p_.block_rows;
    const uint32_t last = first + p_.block_rows < p_.rows ? first + p_.block_rows : p_.rows;
    Loaded next;
    if (kLoadsAhead) load(first, next);
#pragma unroll 1
    for (uint32_t row = first; row < last; ++row) {
      Loaded loaded = next;
      if (!kLoadsAhead) load(row, loaded);
      if (kLoadsAhead && row + 1 < last) load(row + 1, next);
      do_row(row, loaded);
    }
    if (sums_rows_) leave_sums();
  }

 private:
  struct Loaded {
    Vector<Type> x[kVectors], grad[kVectors];
  };

  DMDR_DEVICE void load(uint32_t row, Loaded &loaded) const {
    const int64_t x = row_offset(args_.x, sample_, row), grad = row_offset(args_.grad_y, sample_, row);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      loaded.x[v] = share_.has(v) ? share_.load(args_.x, x, v) : Vector<Type>::zero();
      loaded.grad[v] = share_.has(v) ? share_.load(args_.grad_y, grad, v) : Vector<Type>::zero();
    }
  }

  DMDR_DEVICE void do_row(uint32_t row, const Loaded &loaded) {
    const float mean = args_.mean[sample_ * p_.rows + row], rstd = args_.rstd[sample_ * p_.rows + row];
    const int64_t at_scale = row_offset(args_.scale, sample_, row);
    Vector<Type> scales[kVectors];
    RowSums sums = {0.f, 0.f};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      scales[v] = share_.has(v) ? share_.load(args_.scale, at_scale, v) : Vector<Type>::zero();
      float grad[kWidth], normal[kWidth], scale[kWidth];
      loaded.grad[v].get(grad);
      loaded.x[v].get(normal);
      scales[v].get(scale);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        // Outside the row grad is 0 and nothing is added.
        normal[j] = (normal[j] - mean) * rstd;
        const float of_normal = grad[j] * (1.f + scale[j]);
        sums.along += of_normal;
        sums.across += of_normal * normal[j];
        shift_sum_[v][j] += grad[j];
        scale_sum_[v][j] += grad[j] * normal[j];
        normal[j] *= grad[j];
      }
      if (args_.gather == DMDR_GATHER_PER_ROW && share_.has(v)) {
        share_.store(args_.grad_shift, row_offset(args_.grad_shift, sample_, row), v, grad);
        share_.store(args_.grad_scale, row_offset(args_.grad_scale, sample_, row), v, normal);
      }
    }
    if (args_.grad_x.data != nullptr) write_grad_x(row, loaded, scales, mean, rstd, sums);
  }

  DMDR_DEVICE void write_grad_x(uint32_t row, const Loaded &loaded, const Vector<Type> (&scales)[kVectors], float mean,
                                float rstd, RowSums sums) {
    sums = block_reduce<kThreads>(shared_.sums[row % 2], sums, AddSums());
    const float along = sums.along / static_cast<float>(p_.features);
    const float across = sums.across / static_cast<float>(p_.features);
    const int64_t to = row_offset(args_.grad_x, sample_, row);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!share_.has(v)) continue;
      float x[kWidth], grad[kWidth], scale[kWidth];
      loaded.x[v].get(x);
      loaded.grad[v].get(grad);
      scales[v].get(scale);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        x[j] = rstd * (grad[j] * (1.f + scale[j]) - along - (x[j] - mean) * rstd * across);
      share_.store(args_.grad_x, to, v, x);
    }
  }

  // [block][shift, scale][features] floats
  DMDR_DEVICE void leave_sums() const {
    float *const shift = args_.workspace + static_cast<int64_t>(blockIdx.x) * 2 * p_.features;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!share_.has(v)) continue;
      leave(shift + share_.column(v), shift_sum_[v], share_.extent(v).count);
      leave(shift + p_.features + share_.column(v), scale_sum_[v], share_.extent(v).count);
    }
  }
  static DMDR_DEVICE void leave(float *to, const float (&x)[kWidth], int count) {
#pragma unroll
    for (int j = 0; j < kWidth; j += 4) {
      if constexpr (Type::kFixed) {
        *reinterpret_cast<float4 *>(to + j) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
      } else {
#pragma unroll
        for (int i = j; i < j + 4; ++i)
          if (i < count) to[i] = x[i];
      }
    }
  }

  const NormParams &p_;
  const dmdr_layer_norm_modulate_args &args_;
  NormShared &shared_;
  const Share share_;
  const uint32_t sample_;
  const bool sums_rows_;
  float shift_sum_[kVectors][kWidth], scale_sum_[kVectors][kWidth];
};

// Blocks that a multiprocessor's registers hold.
template <class Type, int kThreads>
constexpr int kNormBlocks = Type::kFixed ? 512 / kThreads : 1;

template <class Type, int kThreads>
__global__ void __launch_bounds__(kThreads, kNormBlocks<Type, kThreads>) norm_backward_kernel(const __grid_constant__ NormParams p) {
  BlockRows<Type, kThreads>(p, *shared_memory<NormShared>()).run();
}

// ---- the second stage: blocks of 32 columns, sixteen threads to a column -------------------------------------------
constexpr int kGatherColumns = 32, kGatherParts = 16;

struct GatherParams {
  const float *sums;  // [groups][blocks][2][features]
  dmdr_tensor out[2];
  uint32_t features, blocks, column_blocks;
};
struct GatherShared {
  float part[kGatherParts][kGatherColumns];
};

__global__ void __launch_bounds__(kGatherColumns *kGatherParts) norm_gather_kernel(const __grid_constant__ GatherParams p) {
  GatherShared &shared = *shared_memory<GatherShared>();
  const uint32_t vector = blockIdx.x % 2, group = blockIdx.x / 2 / p.column_blocks;
  const uint32_t lane = threadIdx.x % kGatherColumns, part = threadIdx.x / kGatherColumns;
  const uint32_t column = blockIdx.x / 2 % p.column_blocks * kGatherColumns + lane;
  float total = 0.f;
  if (column < p.features) {
    const float *const from = p.sums + (static_cast<int64_t>(group) * p.blocks * 2 + vector) * p.features + column;
#pragma unroll 4
    for (uint32_t block = part; block < p.blocks; block += kGatherParts)
      total += from[static_cast<int64_t>(block) * 2 * p.features];
  }
  shared.part[part][lane] = total;
  __syncthreads();
  if (part != 0 || column >= p.features) return;
#pragma unroll
  for (int i = 1; i < kGatherParts; ++i) total += shared.part[i][lane];
  const dmdr_tensor &out = p.out[vector];
  const float one[8] = {total};
  Vector<Any>::store(out, group * out.stride[0] + column, one, {1, false});
}

int gather(const NormParams &params, void *stream) {
  const auto &args = params.args;
  const bool all = args.gather == DMDR_GATHER_ALL;
  const int64_t groups = all ? 1 : args.shape[0];
  const int64_t blocks = params.blocks_per_sample * (all ? args.shape[0] : 1);
  const int64_t column_blocks = ceil_div(params.features, kGatherColumns);
  const GatherParams gathered = {args.workspace, {args.grad_shift, args.grad_scale}, params.features,
                                 static_cast<uint32_t>(blocks), static_cast<uint32_t>(column_blocks)};
  const Grid grid = {groups * column_blocks * 2, kGatherColumns * kGatherParts, sizeof(GatherShared)};
  return launch(norm_gather_kernel, grid, stream, gathered);
}

template <class Type, int kThreads>
int run(const NormParams &params, void *stream) {
  const Grid grid = {params.args.shape[0] * params.blocks_per_sample, kThreads, sizeof(NormShared)};
  const int status = launch(norm_backward_kernel<Type, kThreads>, grid, stream, params);
  return status == DMDR_OK && params.args.gather > DMDR_GATHER_PER_ROW ? gather(params, stream) : status;
}

}  // namespace
}  // namespace dmdr

using namespace dmdr;

extern "C" {

int64_t dmdr_modulation_workspace(int64_t batch, int64_t rows, int64_t features, int64_t vectors) {
  return rows == 0 ? 0 : batch * ceil_div(rows, block_rows(batch, rows)) * features * vectors;
}

int dmdr_layer_norm_modulate_bwd(const dmdr_layer_norm_modulate_args *args, void *stream) {
  if (wrong_size(args)) return DMDR_ERROR_STRUCT_SIZE;
  if (args->gather < DMDR_GATHER_NONE || args->gather > DMDR_GATHER_ALL) return DMDR_ERROR_ARGUMENT;
  // The sums of rows are written by the second stage, whatever their dtype.
  const bool per_row = args->gather == DMDR_GATHER_PER_ROW;
  const dmdr_tensor *const shift = per_row ? &args->grad_shift : &args->x;
  const dmdr_tensor *const scale = per_row ? &args->grad_scale : &args->x;
  const auto tensors = {&args->x, &args->scale, &args->grad_y, &args->grad_x, shift, scale};
  if (!known_dtypes({&args->grad_shift, &args->grad_scale})) return DMDR_ERROR_DTYPE;
  return with_rows(*args, tensors, [&](auto type, NormParams params) {
    using Type = decltype(type);
    params.block_rows = static_cast<uint32_t>(block_rows(args->shape[0], params.rows));
    params.blocks_per_sample = static_cast<uint32_t>(ceil_div(params.rows, params.block_rows));
    if (params.features <= 128 * kColumns) return run<Type, 128>(params, stream);
    if (params.features <= 256 * kColumns) return run<Type, 256>(params, stream);
    return run<Type, 512>(params, stream);
  });
}

}  // extern "C"
