// rms_norm_scale: y = x rstd weight scale, alone or added to a residual, and its gradients.
#include "kernels.h"
#include "modulated_norm.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

// The norm's weight, or none, which counts as ones.
template <class Type>
struct Weight {
  Row<Type> row;
  bool present;
  DMDR_INLINE explicit Weight(const dmdr_tensor &weight) : row(weight, 0), present(weight.data != nullptr) {}
  template <class Where>
  DMDR_INLINE F times(Where where, F x) const {
    return present ? x * row.load(where) : x;
  }
};

}  // namespace

void rms_norm_scale_fwd(const dmdr_rms_norm_scale_args &args) {
  const int64_t rows = args.shape[1], count = args.shape[DMDR_OUTER], elements = args.shape[0] * rows * count;
  const bool adds = args.residual.data != nullptr;
  with_common_type({&args.x, &args.weight, &args.scale, &args.residual, &args.y}, [&](auto type) {
    using Type = decltype(type);
    const Weight<Type> weight(args.weight);
    for_items(args.shape[0] * rows, elements, args.num_threads, [&](int64_t item) {
      const int64_t sample = item / rows, row = item % rows;
      const Row<Type> x(args.x, at_row(args.x, sample, row)), scale(args.scale, at_row(args.scale, sample, row));
      const Row<Type> residual(args.residual, at_row(args.residual, sample, row));
      const Output<Type> y(args.y, at_row(args.y, sample, row), elements);
      const float square = sum_row(count, [&](auto where) {
                             const F value = x.load(where);
                             return Pair{value * value, F{}};
                           }).first / count;
      const float rstd = static_cast<float>(1. / __builtin_sqrt(static_cast<double>(square) + args.eps));
      args.rstd[item] = rstd;
      for_vectors(0, count, [&](auto where) {
        const F value = weight.times(where, x.load(where) * rstd) * scale.load(where);
        y.store(where, adds ? residual.load(where) + value : value);
      });
    });
  });
}

void rms_norm_scale_bwd(const dmdr_rms_norm_scale_args &args) {
  const int64_t count = args.shape[DMDR_OUTER], stride = 2 * count;
  const RowBlocks blocks(args.shape);
  const int64_t elements = blocks.batch * blocks.rows * count;
  with_common_type(
      {&args.x, &args.weight, &args.scale, &args.grad_y, &args.grad_x, &args.grad_weight, &args.grad_scale},
      [&](auto type) {
        using Type = decltype(type);
        const Weight<Type> weight(args.weight);
        for_items(blocks.items(), elements, args.num_threads, [&](int64_t item) {
          float *const space = args.workspace + item * stride;
          const VectorSum<Type> weight_sum(args.gather_weight, space, count);
          const VectorSum<Type> scale_sum(args.gather, space + count, count);
          const int64_t sample = blocks.sample(item);
          for (int64_t row = blocks.first(item); row < blocks.first(item) + blocks.count(item); ++row) {
            const Row<Type> x(args.x, at_row(args.x, sample, row)), scale(args.scale, at_row(args.scale, sample, row));
            const Row<Type> grad(args.grad_y, at_row(args.grad_y, sample, row));
            const Output<Type> grad_x(args.grad_x, at_row(args.grad_x, sample, row), elements);
            const Row<Type> grad_weight(args.grad_weight, at_row(args.grad_weight, sample, row));
            const Row<Type> grad_scale(args.grad_scale, at_row(args.grad_scale, sample, row));
            const float rstd = args.rstd[sample * blocks.rows + row];
            const float across = sum_row(count, [&](auto where) {
                                   const F normal = x.load(where) * rstd, g = grad.load(where);
                                   const F to_weight = g * scale.load(where) * normal;
                                   weight_sum.add(where, to_weight, grad_weight);
                                   scale_sum.add(where, weight.times(where, g * normal), grad_scale);
                                   return Pair{weight.times(where, to_weight), F{}};
                                 }).first / count;
            if (args.grad_x.data == nullptr) continue;
            for_vectors(0, count, [&](auto where) {
              const F inner = weight.times(where, grad.load(where) * scale.load(where));
              grad_x.store(where, rstd * (inner - x.load(where) * rstd * across));
            });
          }
        });
        const auto gather = [&](const dmdr_tensor &out, int64_t how, int64_t at) {
          gather_blocks<Type>(out, how, blocks, args.workspace, stride, at, count, args.num_threads);
        };
        gather(args.grad_weight, args.gather_weight, 0);
        gather(args.grad_scale, args.gather, count);
      });
}

inline dmdr_status check(const dmdr_rms_norm_scale_args &args) {
  if (has_bad_dtype({args.x, args.weight, args.scale, args.residual, args.y, args.grad_y, args.grad_x,
                     args.grad_weight, args.grad_scale}))
    return DMDR_ERROR_DTYPE;
  const bool bad = outside(args.gather_weight, DMDR_GATHER_ALL) || outside(args.gather, DMDR_GATHER_ALL);
  return bad || has_bad_size(args.shape) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

DMDR_ENTRY(rms_norm_scale_fwd, dmdr_rms_norm_scale_args)
DMDR_ENTRY(rms_norm_scale_bwd, dmdr_rms_norm_scale_args)
