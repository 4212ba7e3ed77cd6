// dmd_gradient. Two ways, both with every sum in a fixed order:
//
//   one pass   a cluster of blocks holds a sample: each block keeps fake - real of its slice in shared memory while the
//              cluster's distributed shared memory reduces the norm, then writes g. Every tensor is touched once:
//              12 bytes per element in bf16 with guidance.
//   two        samples beyond a cluster, and the norm over the whole batch: the first launch leaves one sum per block,
//              the second adds up those of its sample and reads the predictions again (18 bytes).
//
// The loss is summed by whichever block finishes last, in block order: an integer ticket finds that block.
#include "dmd_sample.cuh"
#include "launch.h"
#include "reduce.cuh"
#include "scale.h"

namespace dmdr {
namespace {

// ---- the workspace: a ticket that is 0 before and after, then what each block leaves -------------------------------
constexpr int kMeasuredWords = 3, kWrittenWords = 2;
// No way of cutting has more blocks: a slice holds at least 1024 vectors, and a vector of a short row may hold one element.
int64_t most_blocks(int64_t batch, int64_t sample) { return batch * (1 + sample / 1024); }

DMDR_DEVICE uint32_t *ticket_of(const DmdParams &p) { return reinterpret_cast<uint32_t *>(p.args.workspace); }
DMDR_DEVICE double *written_by(const DmdParams &p, uint32_t block) {
  return p.args.workspace + 1 + block * kWrittenWords;
}
DMDR_DEVICE double *measured_by(const DmdParams &p, uint32_t block) {
  return p.args.workspace + 1 + gridDim.x * kWrittenWords + block * kMeasuredWords;
}

// ---- the loss -------------------------------------------------------------------------------------------------------
struct LossTerms {
  double square, count;
};
struct AddTerms {
  DMDR_DEVICE LossTerms operator()(const LossTerms &a, const LossTerms &b) const {
    return {a.square + b.square, a.count + b.count};
  }
};
struct LossSpace {
  BlockSpace<LossTerms> block, grid;
  uint32_t is_last;
};

DMDR_DEVICE void finish_loss(const DmdParams &p, LossSpace &space, LossTerms terms) {
  terms = block_reduce<kDmdThreads>(space.block, terms, AddTerms());
  if (threadIdx.x == 0) {
    written_by(p, blockIdx.x)[0] = terms.square;
    written_by(p, blockIdx.x)[1] = terms.count;
    __threadfence();  // the sums before the ticket
    space.is_last = atomicAdd(ticket_of(p), 1u) == gridDim.x - 1;
    __threadfence();  // the ticket before the others' sums
  }
  __syncthreads();
  if (space.is_last == 0) return;
  terms = {0., 0.};
#pragma unroll 1
  for (uint32_t block = threadIdx.x; block < gridDim.x; block += kDmdThreads)
    terms = AddTerms()(terms, {__ldcg(written_by(p, block)), __ldcg(written_by(p, block) + 1)});
  terms = block_reduce<kDmdThreads>(space.grid, terms, AddTerms());
  if (threadIdx.x == 0) {
    const double count = terms.count < 1. ? 1. : terms.count;
    const double factor = 2. * p.args.factor;
    const float scale = static_cast<float>(p.args.reduction_sum != 0 ? factor : factor / count);
    *p.args.loss_scale = p.args.scaled != 0 ? 1.f : scale;
    *p.args.loss = static_cast<float>(terms.square * 0.5 * scale);
    *ticket_of(p) = 0;
  }
}

// ---- one pass -------------------------------------------------------------------------------------------------------
struct alignas(kAccessBytes) OnePassShared {  // the tile follows it
  BlockSpace<Measured> block;
  ClusterSpace<Measured> cluster;
  LossSpace loss;
};

// A thread's part of the block's slice in shared memory: neighbouring threads in neighbouring 16 bytes.
template <int kWidth>
class Tile {
 public:
  DMDR_DEVICE explicit Tile(OnePassShared *shared) : slot_(reinterpret_cast<float4 *>(shared + 1) + threadIdx.x) {}
  DMDR_DEVICE void set(uint32_t step, const float (&x)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) at(step, i) = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  }
  DMDR_DEVICE void get(uint32_t step, float (&x)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) {
      const float4 four = at(step, i);
      x[4 * i] = four.x;
      x[4 * i + 1] = four.y;
      x[4 * i + 2] = four.z;
      x[4 * i + 3] = four.w;
    }
  }

 private:
  DMDR_DEVICE float4 &at(uint32_t step, int part) const { return slot_[(step * (kWidth / 4) + part) * kDmdThreads]; }
  float4 *slot_;
};

// Bytes of the tile for a slice of so many vectors.
int64_t tile_bytes(int64_t slice, int width) { return ceil_div(slice, kDmdThreads) * kDmdThreads * width * 4; }

template <class Type>
__global__ void __launch_bounds__(kDmdThreads, kDmdBlocks<Type>) dmd_one_pass_kernel(const __grid_constant__ DmdParams p) {
  OnePassShared *const shared = shared_memory<OnePassShared>();
  const Cluster cluster;
  const uint32_t b = blockIdx.x / p.slices;
  const Slice slice(p, cluster.rank());
  const Tile<Type::kWidth> tile(shared);
  const DmdSample<Type> sample(p.args, b);

  Measured measured = sample.measure(
      p, slice, [&](uint32_t step, const float(&difference)[Type::kWidth]) { tile.set(step, difference); });
  measured = block_reduce<kDmdThreads>(shared->block, measured, MergeMeasured());
  measured = cluster_reduce(cluster, shared->cluster, measured, MergeMeasured());

  const float norm = normalizer(p.args, measured);
  if (cluster.rank() == 0 && threadIdx.x == 0) p.args.norm[b] = norm;
  const Scaling scaling(p.args, b, sample.denoiser.gain, norm);
  NanPolicy policy(p.args);
  policy.look_at(p.args, scaling, measured);
  const auto written = sample.write(
      p, slice, scaling, policy,
      [&](uint32_t step, const auto &, float(&difference)[Type::kWidth]) { tile.get(step, difference); });
  finish_loss(p, shared->loss, {written.square, written.count});
}

// ---- two launches ---------------------------------------------------------------------------------------------------
template <class Type>
__global__ void __launch_bounds__(kDmdThreads, kDmdBlocks<Type>) dmd_measure_kernel(const __grid_constant__ DmdParams p) {
  auto &space = *shared_memory<BlockSpace<Measured>>();
  const DmdSample<Type> sample(p.args, blockIdx.x / p.slices);
  const Slice slice(p, blockIdx.x % p.slices);
  Measured measured = sample.measure(p, slice, [](uint32_t, const float(&)[Type::kWidth]) {});
  measured = block_reduce<kDmdThreads>(space, measured, MergeMeasured());
  if (threadIdx.x != 0) return;
  double *const out = measured_by(p, blockIdx.x);
  out[0] = measured.distance;
  out[1] = measured.count;
  out[2] = measured.largest;
}

struct WriteShared {
  BlockSpace<Measured> block;
  LossSpace loss;
};

// What the first launch found for a sample, or for all of them.
DMDR_DEVICE Measured gather_measured(const DmdParams &p, BlockSpace<Measured> &space, uint32_t b) {
  const bool all = p.args.normalizer == DMDR_GLOBAL;
  const uint32_t first = all ? 0 : b * p.slices, last = all ? gridDim.x : first + p.slices;
  Measured measured = {0., 0., 0, 0};
#pragma unroll 1
  for (uint32_t block = first + threadIdx.x; block < last; block += kDmdThreads) {
    const double *const from = measured_by(p, block);
    // zero_sample looks at its own sample only.
    const bool own = block / p.slices == b;
    measured = MergeMeasured()(measured, {from[0], from[1], own ? static_cast<uint32_t>(from[2]) : 0u, 0});
  }
  return block_reduce<kDmdThreads>(space, measured, MergeMeasured());
}

// kMeasured: the first launch has run. Blocks start from the end: what it read last is still in L2.
template <class Type, bool kMeasured>
__global__ void __launch_bounds__(kDmdThreads, kDmdBlocks<Type>) dmd_write_kernel(const __grid_constant__ DmdParams p) {
  WriteShared &shared = *shared_memory<WriteShared>();
  const uint32_t block = gridDim.x - 1 - blockIdx.x, b = block / p.slices;
  const DmdSample<Type> sample(p.args, b);
  const Measured measured = kMeasured ? gather_measured(p, shared.block, b) : Measured{0., 0., 0, 0};
  const float norm = normalizer(p.args, measured);
  if (block % p.slices == 0 && threadIdx.x == 0) p.args.norm[b] = norm;
  const Scaling scaling(p.args, b, sample.denoiser.gain, norm);
  NanPolicy policy(p.args);
  if (kMeasured) policy.look_at(p.args, scaling, measured);
  const auto written = sample.write(p, Slice(p, block % p.slices), scaling, policy,
                                    [&](uint32_t, const auto &place, float(&difference)[Type::kWidth]) {
                                      float real[Type::kWidth];
                                      sample.differences(sample.load(place), difference, real);
                                    });
  finish_loss(p, shared.loss, {written.square, written.count});
}

// ---- which way ------------------------------------------------------------------------------------------------------
// One pass keeps a slice in at most this much shared memory: two blocks then fit on a multiprocessor of 228 KB (of
// 164 KB before sm_90), and one reads while the other writes. A third fits below the preferred size.
constexpr int64_t kMostTile = 104 << 10, kPreferredTile = 64 << 10, kMostTileBeforeClusters = 72 << 10;
// So many blocks keep a large GPU busy; fewer are cut finer, down to slices of so many elements.
constexpr int64_t kBlocksWorthHaving = 256, kSmallestSlice = 4096;

template <class Type>
Grid one_pass_grid(const Layout &layout, int slices) {
  const int64_t tile = tile_bytes(ceil_div(layout.vectors, slices), Type::kWidth);
  return {layout.batch * slices, kDmdThreads, sizeof(OnePassShared) + tile, slices};
}

// Into how many slices one pass cuts a sample, 0 if it cannot.
template <class Type>
int one_pass_slices(const Layout &layout) {
  const auto tile = [&](int slices) { return tile_bytes(ceil_div(layout.vectors, slices), Type::kWidth); };
  if (!has_clusters()) return tile(1) <= kMostTileBeforeClusters ? 1 : 0;
  for (int slices = 1; slices <= kPortableCluster; slices *= 2) {
    const bool fine = layout.batch * slices >= kBlocksWorthHaving || layout.sample < 2 * slices * kSmallestSlice;
    if (tile(slices) <= kPreferredTile && (fine || slices == kPortableCluster)) return slices;
  }
  // More than eight blocks is a size that not every device schedules.
  if (tile(kMaxCluster) <= kMostTile && has_room(dmd_one_pass_kernel<Type>, one_pass_grid<Type>(layout, kMaxCluster)))
    return kMaxCluster;
  return tile(kPortableCluster) <= kMostTile ? kPortableCluster : 0;
}

template <class Type>
int run_one_pass(DmdParams params, int slices, void *stream) {
  params.slices = slices;
  params.slice = static_cast<uint32_t>(ceil_div(params.layout.vectors, slices));
  const Grid grid = one_pass_grid<Type>(params.layout, slices);
  if (grid.blocks > most_blocks(params.layout.batch, params.layout.sample)) return DMDR_ERROR_ARGUMENT;
  return launch(dmd_one_pass_kernel<Type>, grid, stream, params);
}

template <class Type>
int run_two(DmdParams params, bool measure, void *stream) {
  constexpr int64_t kElements = 16384, kMostBlocks = 1024;
  const int64_t total = params.layout.batch * params.layout.vectors;
  const int64_t slice = std::max(kElements / Type::kWidth, ceil_div(total, kMostBlocks));
  params.slice = static_cast<uint32_t>(slice);
  params.slices = static_cast<uint32_t>(ceil_div(params.layout.vectors, slice));
  const int64_t blocks = params.layout.batch * params.slices;
  if (blocks > most_blocks(params.layout.batch, params.layout.sample)) return DMDR_ERROR_ARGUMENT;
  if (!measure) return launch(dmd_write_kernel<Type, false>, {blocks, kDmdThreads, sizeof(WriteShared)}, stream, params);
  const Grid first = {blocks, kDmdThreads, sizeof(BlockSpace<Measured>)};
  const int status = launch(dmd_measure_kernel<Type>, first, stream, params);
  if (status != DMDR_OK) return status;
  return launch(dmd_write_kernel<Type, true>, {blocks, kDmdThreads, sizeof(WriteShared)}, stream, params);
}

// What multiplies g as it is written: with `scaled` the mean is over all elements.
float written(const DmdArgs &args, const Layout &layout) {
  if (args.scaled == 0) return 1.f;
  const double elements = static_cast<double>(layout.batch) * layout.sample;
  return static_cast<float>(args.reduction_sum != 0 ? 2. * args.factor : 2. * args.factor / elements);
}

bool bad_modes(const DmdArgs &args) {
  const auto outside = [](int64_t value, int64_t last) { return value < 0 || value > last; };
  return outside(args.cfg_mode, DMDR_CFG_OFFSET) || outside(args.prediction, DMDR_X0) ||
         outside(args.normalizer, DMDR_NO_NORMALIZER) || outside(args.eps_mode, DMDR_EPS_NONE) ||
         outside(args.nan_policy, DMDR_NAN_KEEP);
}

// A fixed type reads the mask in words as well.
bool mask_fits(const DmdArgs &args) {
  const dmdr_tensor &mask = args.mask;
  return mask.data == nullptr || (reinterpret_cast<uintptr_t>(mask.data) % 4 == 0 &&
                                  (args.shape[0] == 1 || mask.stride[0] % 4 == 0));
}

}  // namespace
}  // namespace dmdr

using namespace dmdr;

extern "C" {

int64_t dmdr_dmd_gradient_workspace(int64_t outer_rows, int64_t inner) {
  return 1 + (kMeasuredWords + kWrittenWords) * most_blocks(outer_rows, inner);
}

int dmdr_dmd_gradient_fwd(const dmdr_dmd_gradient_args *args, void *stream) {
  if (wrong_size(args)) return DMDR_ERROR_STRUCT_SIZE;
  if (bad_modes(*args)) return DMDR_ERROR_ARGUMENT;
  const auto tensors = {&args->x0, &args->x_t, &args->pred_fake, &args->pred_real, &args->pred_real_uncond, &args->grad};
  return with_layout(args->shape, tensors, mask_fits(*args), [&](auto type, const Layout &layout) {
    using Type = decltype(type);
    const DmdParams params = {layout, *args, written(*args, layout), 0, 0};
    const bool drops = args->nan_policy == DMDR_NAN_ZERO_SAMPLE;
    if (args->normalizer == DMDR_NO_NORMALIZER && !drops) return run_two<Type>(params, false, stream);
    const int slices = args->normalizer == DMDR_GLOBAL && layout.batch > 1 ? 0 : one_pass_slices<Type>(layout);
    return slices > 0 ? run_one_pass<Type>(params, slices, stream) : run_two<Type>(params, true, stream);
  });
}

int dmdr_dmd_gradient_bwd(const dmdr_dmd_gradient_args *args, void *stream) {
  if (wrong_size(args)) return DMDR_ERROR_STRUCT_SIZE;
  return scale(args->shape, args->pred_fake, args->grad, nullptr, args->grad_loss, args->loss_scale, stream);
}

}  // extern "C"
