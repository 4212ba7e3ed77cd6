// dmd_gradient: two passes, the normaliser's sum and then the gradient with its loss. A pass keeps one partial sum per
// block of DMDR_DMD_BLOCK elements and the sums are added in block order, so no thread count changes a bit. All threads
// share a few samples and take them through both passes before the next ones, the second pass from the end: so that much
// of the predictions that both read is still in the cache.
//
// g is a difference of predictions: x0 and x_t cancel in x0_hat(fake) - x0_hat(real) and are read for the normaliser
// only.
#include "kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

// Elements, in whole samples, that go through both passes before the next: what both read of them has 8 MiB in float32.
constexpr int64_t kTogether = 1 << 20;

// What one block leaves in the workspace.
struct BlockSums {
  double distance;   // sum |x0 - x0_hat(real)| where the mask is on
  double count;      // elements where the mask is on
  double square;     // sum g^2
  double nonfinite;  // 1 if an element of g is not finite in grad's dtype
};

struct Denoiser {
  float keep, gain;  // x0_hat = keep x_t + gain prediction
  bool reads_x_t;
};

Denoiser denoiser(const dmdr_dmd_gradient_args &args, int64_t sample) {
  const float sigma = args.sigma[sample];
  const float alpha = args.alpha != nullptr ? args.alpha[sample] : 1.f - sigma;
  if (args.prediction == DMDR_FLOW) return {1.f, -sigma, true};
  if (args.prediction == DMDR_EPS) return {1.f / alpha, -sigma / alpha, true};
  if (args.prediction == DMDR_V) return {alpha, -sigma, true};
  return {0.f, 1.f, false};
}

// The mask's lanes as 0 or -1.
class MaskRow {
 public:
  MaskRow(const dmdr_tensor &mask, int64_t offset) : base_(static_cast<const char *>(mask.data)), offset_(offset) {}
  bool present() const { return base_ != nullptr; }
  DMDR_INLINE I on(Whole where) const { return widened_bytes(base_ + offset_ + where.at) != 0; }
  DMDR_INLINE I on(Tail where) const {
    char buffer[kLanes] = {};
    std::memcpy(buffer, base_ + offset_ + where.at, where.count);
    return widened_bytes(buffer) != 0;
  }

 private:
  const char *base_;
  int64_t offset_;
};

// The teacher's prediction with classifier-free guidance.
template <class Type>
class RealPrediction {
 public:
  RealPrediction(const dmdr_dmd_gradient_args &args, const Position &at)
      : cond_(args.pred_real, at.offset(args.pred_real)),
        uncond_(args.pred_real_uncond, at.offset(args.pred_real_uncond)),
        guided_(args.pred_real_uncond.data != nullptr),
        standard_(args.cfg_mode == DMDR_CFG_STANDARD),
        scale_(splat(args.cfg != nullptr ? args.cfg[at.batch()] : static_cast<float>(args.cfg_scale))) {}
  template <class Where>
  DMDR_INLINE F load(Where where) const {
    cond_.template prefetch<kAgain>(where);
    const F cond = cond_.load(where);
    if (!guided_) return cond;
    uncond_.template prefetch<kAgain>(where);
    const F uncond = uncond_.load(where);
    return (standard_ ? uncond : cond) + scale_ * (cond - uncond);
  }

 private:
  Row<Type> cond_, uncond_;
  bool guided_, standard_;
  F scale_;
};

template <class Type>
void sum_distance(const dmdr_dmd_gradient_args &args, const Position &at, int64_t first, int64_t count,
                  BlockSums &sums) {
  const Row<Type> x0(args.x0, at.offset(args.x0)), x_t(args.x_t, at.offset(args.x_t));
  const RealPrediction<Type> real(args, at);
  const MaskRow mask(args.mask, at.offset(args.mask));
  const Denoiser model = denoiser(args, at.batch());
  const F keep = splat(model.keep), gain = splat(model.gain), one = splat(1.f);
  sums.distance = sums.count = 0.;
  for (int64_t run = 0; run < count; run += kRun) {
    F distance = {}, selected = {};
    for_vectors(first + run, count - run < kRun ? count - run : kRun, [&](auto where) {
      x0.template prefetch<kOnce>(where);
      F apart = x0.load(where) - gain * real.load(where);
      if (model.reads_x_t) {
        x_t.template prefetch<kOnce>(where);
        apart -= keep * x_t.load(where);
      }
      apart = abs(apart);
      if (mask.present()) {
        const I on = mask.on(where);
        apart = select(on, apart, F{});
        selected += select(on, one, F{});  // a tail's missing mask bytes are 0
      }
      distance += counted(where, apart);
    });
    sums.distance += sum(distance);
    sums.count += sum(selected);
  }
  if (!mask.present()) sums.count = static_cast<double>(count);
}

struct Mean {
  double distance, count;
  double value() const { return distance / (count < 1. ? 1. : count); }
};

Mean mean_of_sample(const BlockSums *sums, int64_t blocks) {
  Mean mean = {0., 0.};
  for (int64_t block = 0; block < blocks; ++block) {
    mean.distance += sums[block].distance;
    mean.count += sums[block].count;
  }
  return mean;
}

float normalizer(const dmdr_dmd_gradient_args &args, const Mean &mean) {
  if (args.normalizer == DMDR_NO_NORMALIZER) return 1.f;
  const float norm = static_cast<float>(mean.value());
  if (args.eps_mode == DMDR_EPS_ADD) return norm + static_cast<float>(args.eps);
  return args.eps_mode == DMDR_EPS_CLAMP && norm < args.eps ? static_cast<float>(args.eps) : norm;
}

double loss_scale(const dmdr_dmd_gradient_args &args, double count) {
  return args.reduction_sum ? 2. * args.factor : 2. * args.factor / (count < 1. ? 1. : count);
}

// Values of this magnitude and more round to an infinity in the dtype, and its largest finite value.
struct Range {
  float overflow, largest;
};
Range range(int64_t dtype) {
  if (dtype == DMDR_BF16) return {0x1.ffp127f, 0x1.fep127f};
  if (dtype == DMDR_F16) return {65520.f, 65504.f};
  return {__builtin_inff(), __FLT_MAX__};
}

// weight gain / norm (fake - real). One factor per sample, unless it leaves fp32's normal range although its parts
// do not: then in the formula's order, where 0 / norm stays 0 and a tiny norm does not overflow by itself.
struct Scaling {
  float gain, norm, weight, factor;
  bool folds;
  Scaling(const dmdr_dmd_gradient_args &args, int64_t sample)
      : gain(denoiser(args, sample).gain), norm(args.norm[sample]),
        weight(args.weight != nullptr ? args.weight[sample] : 1.f), factor(weight * (gain / norm)),
        folds(__builtin_isnormal(factor) && __builtin_isnormal(gain / norm)) {}
  DMDR_INLINE F of(F difference) const {
    return folds ? factor * difference : weight * (gain * difference / norm);
  }
};

template <class Type>
void write_gradient(const dmdr_dmd_gradient_args &args, const Position &at, int64_t first, int64_t count,
                    int64_t elements, float scale, BlockSums &sums) {
  const Row<Type> fake(args.pred_fake, at.offset(args.pred_fake));
  const Output<Type> grad(args.grad, at.offset(args.grad), elements, kPastOwnInputs);
  const RealPrediction<Type> real(args, at);
  const MaskRow mask(args.mask, at.offset(args.mask));
  const Scaling scaling(args, at.batch());
  const Range limits = range(args.grad.dtype);
  const bool keeps = args.nan_policy == DMDR_NAN_KEEP, saturates = args.nan_policy == DMDR_NAN_TORCH;
  I nonfinite = {};
  sums.square = 0.;
  for (int64_t run = 0; run < count; run += kRun) {
    F square = {};
    for_vectors(first + run, count - run < kRun ? count - run : kRun, [&](auto where) {
      fake.template prefetch<kOnce>(where);
      F g = scaling.of(fake.load(where) - real.load(where));
      if (mask.present()) g = select(mask.on(where), g, F{});
      if (!keeps) {
        const I bad = ~(abs(g) < limits.overflow);
        const F sign = from_bits((bits(g) & 0x80000000u) | bits(splat(limits.largest)));
        g = select(bad, saturates ? select(g == g, sign, F{}) : F{}, g);
        nonfinite |= (I)counted(where, (F)bad);
      }
      grad.store(where, scale * g);
      square += counted(where, g * g);
    });
    sums.square += sum(square);
  }
  sums.nonfinite = 0.;
  for (int lane = 0; lane < kLanes; ++lane)
    if (nonfinite[lane] != 0) sums.nonfinite = 1.;
}

template <class Type>
void zero_piece(const dmdr_dmd_gradient_args &args, const Position &at, int64_t first, int64_t count) {
  const Row<Type> grad(args.grad, at.offset(args.grad));
  for_vectors(first, count, [&](auto where) { grad.store(where, F{}); });
}

// The loss, leaving out (and telling of) the samples that zero_sample drops.
bool reduce_loss(const dmdr_dmd_gradient_args &args, BlockSums *sums, int64_t blocks_per_sample, float scale) {
  bool dropped = false;
  double total = 0.;
  for (int64_t sample = 0; sample < args.shape[0]; ++sample, sums += blocks_per_sample) {
    double square = 0.;
    bool nonfinite = false;
    for (int64_t block = 0; block < blocks_per_sample; ++block) {
      square += sums[block].square;
      nonfinite = nonfinite || sums[block].nonfinite != 0.;
    }
    const bool drop = nonfinite && args.nan_policy == DMDR_NAN_ZERO_SAMPLE;
    for (int64_t block = 0; drop && block < blocks_per_sample; ++block) sums[block].nonfinite = 1.;
    total += drop ? 0. : square;
    dropped = dropped || drop;
  }
  *args.loss = static_cast<float>(total * 0.5 * scale);
  return dropped;
}

}  // namespace

void dmd_gradient_fwd(const dmdr_dmd_gradient_args &args) {
  const Pieces pieces(args.shape, DMDR_DMD_BLOCK);
  BlockSums *sums = reinterpret_cast<BlockSums *>(args.workspace);
  const int64_t batch = args.shape[0], items = pieces.items(), elements = pieces.elements();
  const int64_t blocks_per_sample = batch == 0 ? 0 : items / batch, per_sample = batch == 0 ? 0 : elements / batch;
  const int64_t fit = per_sample == 0 ? batch : kTogether / per_sample;
  const int64_t together = args.normalizer == DMDR_GLOBAL || fit > batch ? batch : fit < 1 ? 1 : fit;
  // What multiplies g as it is written: with `scaled` the mean is over all elements.
  const float written = args.scaled ? static_cast<float>(loss_scale(args, static_cast<double>(elements))) : 1.f;
  const bool measures = args.normalizer != DMDR_NO_NORMALIZER || args.mask.data != nullptr;
  with_common_type(
      {&args.x0, &args.x_t, &args.pred_fake, &args.pred_real, &args.pred_real_uncond, &args.grad}, [&](auto type) {
        using Type = decltype(type);
        const auto measure = [&](int64_t item) {
          if (measures)
            return sum_distance<Type>(args, Position(args.shape, pieces.row(item)), pieces.first(item),
                                      pieces.count(item), sums[item]);
          sums[item].distance = 0.;
          sums[item].count = static_cast<double>(pieces.count(item));
        };
        const auto write = [&](int64_t item) {
          write_gradient<Type>(args, Position(args.shape, pieces.row(item)), pieces.first(item), pieces.count(item),
                               elements, written, sums[item]);
        };
        Mean all = {0., 0.};
        for (int64_t sample = 0; sample < batch; sample += together) {
          const int64_t after = sample + together < batch ? sample + together : batch, samples = after - sample;
          const int64_t first = sample * blocks_per_sample, count = samples * blocks_per_sample;
          for_items(count, samples * per_sample, args.num_threads, [&](int64_t item) { measure(first + item); });
          for (int64_t one = sample; one < after; ++one) {
            const Mean mean = mean_of_sample(sums + one * blocks_per_sample, blocks_per_sample);
            all.distance += mean.distance;
            all.count += mean.count;
            args.norm[one] = normalizer(args, mean);
          }
          for (int64_t one = sample; args.normalizer == DMDR_GLOBAL && one < after; ++one)
            args.norm[one] = normalizer(args, all);
          for_items(
              count, samples * per_sample, args.num_threads, [&](int64_t item) { write(first + item); }, true);
        }
        const float scale = static_cast<float>(loss_scale(args, all.count));
        *args.loss_scale = args.scaled ? 1.f : scale;
        if (reduce_loss(args, sums, blocks_per_sample, scale))
          for_items(items, elements, args.num_threads, [&](int64_t item) {
            if (sums[item].nonfinite != 0.)
              zero_piece<Type>(args, Position(args.shape, pieces.row(item)), pieces.first(item), pieces.count(item));
          });
      });
}

void dmd_gradient_bwd(const dmdr_dmd_gradient_args &args) {
  const Pieces pieces(args.shape, DMDR_DMD_BLOCK);
  const F scale = splat(*args.grad_loss * *args.loss_scale);
  with_common_type({&args.pred_fake, &args.grad}, [&](auto type) {
    using Type = decltype(type);
    for_items(pieces.items(), pieces.elements(), args.num_threads, [&](int64_t item) {
      const Position at(args.shape, pieces.row(item));
      const Row<Type> g(args.pred_fake, at.offset(args.pred_fake));
      const Output<Type> grad(args.grad, at.offset(args.grad), pieces.elements());
      for_vectors(pieces.first(item), pieces.count(item),
                  [&](auto where) { grad.store(where, scale * g.load(where)); });
    });
  });
}

inline dmdr_status check(const dmdr_dmd_gradient_args &args) {
  if (has_bad_dtype({args.x0, args.x_t, args.pred_fake, args.pred_real, args.pred_real_uncond, args.grad}))
    return DMDR_ERROR_DTYPE;
  const bool bad_mode = outside(args.cfg_mode, DMDR_CFG_OFFSET) || outside(args.prediction, DMDR_X0) ||
                        outside(args.normalizer, DMDR_NO_NORMALIZER) || outside(args.eps_mode, DMDR_EPS_NONE) ||
                        outside(args.nan_policy, DMDR_NAN_KEEP);
  return bad_mode || has_bad_size(args.shape) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

#if defined(DMDR_EXPORTS)
int64_t dmdr_dmd_gradient_workspace(int64_t outer_rows, int64_t inner) {
  return 4 * outer_rows * dmdr::DMDR_LEVEL::ceil_div(inner, DMDR_DMD_BLOCK);
}
#endif

DMDR_ENTRY(dmd_gradient_fwd, dmdr_dmd_gradient_args)
DMDR_ENTRY(dmd_gradient_bwd, dmdr_dmd_gradient_args)
