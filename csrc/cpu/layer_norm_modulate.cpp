// layer_norm_modulate: y = (x - mean) rstd (1 + scale) + shift, and its gradients.
#include "kernels.h"
#include "modulated_norm.h"

namespace dmdr {
namespace DMDR_LEVEL {
void layer_norm_modulate_fwd(const dmdr_layer_norm_modulate_args &args) {
  const int64_t rows = args.shape[1], count = args.shape[DMDR_OUTER];
  with_common_type({&args.x, &args.shift, &args.scale, &args.y}, [&](auto type) {
    using Type = decltype(type);
    for_items(args.shape[0] * rows, args.shape[0] * rows * count, args.num_threads, [&](int64_t item) {
      const int64_t sample = item / rows, row = item % rows;
      const Row<Type> x(args.x, at_row(args.x, sample, row));
      const Moments norm = moments(x, count, args.eps);
      args.mean[item] = norm.mean;
      args.rstd[item] = norm.rstd;
      modulate(x, norm, Row<Type>(args.shift, at_row(args.shift, sample, row)),
               Row<Type>(args.scale, at_row(args.scale, sample, row)),
               Output<Type>(args.y, at_row(args.y, sample, row), args.shape[0] * rows * count), count);
    });
  });
}

void layer_norm_modulate_bwd(const dmdr_layer_norm_modulate_args &args) {
  const int64_t count = args.shape[DMDR_OUTER], stride = 2 * count;
  const RowBlocks blocks(args.shape);
  const int64_t elements = blocks.batch * blocks.rows * count;
  with_common_type(
      {&args.x, &args.scale, &args.grad_y, &args.grad_x, &args.grad_shift, &args.grad_scale}, [&](auto type) {
        using Type = decltype(type);
        for_items(blocks.items(), elements, args.num_threads, [&](int64_t item) {
          float *const space = args.workspace + item * stride;
          const VectorSum<Type> shift_sum(args.gather, space, count), scale_sum(args.gather, space + count, count);
          const int64_t sample = blocks.sample(item);
          for (int64_t row = blocks.first(item); row < blocks.first(item) + blocks.count(item); ++row) {
            const Row<Type> x(args.x, at_row(args.x, sample, row)), scale(args.scale, at_row(args.scale, sample, row));
            const Row<Type> grad(args.grad_y, at_row(args.grad_y, sample, row));
            const Output<Type> grad_x(args.grad_x, at_row(args.grad_x, sample, row), elements);
            const Row<Type> grad_shift(args.grad_shift, at_row(args.grad_shift, sample, row));
            const Row<Type> grad_scale(args.grad_scale, at_row(args.grad_scale, sample, row));
            const float mean = args.mean[sample * blocks.rows + row], rstd = args.rstd[sample * blocks.rows + row];
            const TwoSums sums = sum_row(count, [&](auto where) {
              const F g = grad.load(where), normal = (x.load(where) - mean) * rstd;
              shift_sum.add(where, g, grad_shift);
              scale_sum.add(where, g * normal, grad_scale);
              const F to_normal = g * (1.f + scale.load(where));
              return Pair{to_normal, to_normal * normal};
            });
            if (args.grad_x.data == nullptr) continue;
            const float along = sums.first / count, across = sums.second / count;
            for_vectors(0, count, [&](auto where) {
              const F normal = (x.load(where) - mean) * rstd, to_normal = grad.load(where) * (1.f + scale.load(where));
              grad_x.store(where, rstd * (to_normal - along - normal * across));
            });
          }
        });
        gather_blocks<Type>(args.grad_shift, args.gather, blocks, args.workspace, stride, 0, count, args.num_threads);
        gather_blocks<Type>(args.grad_scale, args.gather, blocks, args.workspace, stride, count, count,
                            args.num_threads);
      });
}

inline dmdr_status check(const dmdr_layer_norm_modulate_args &args) {
  if (has_bad_dtype({args.x, args.shift, args.scale, args.y, args.grad_y, args.grad_x, args.grad_shift,
                     args.grad_scale}))
    return DMDR_ERROR_DTYPE;
  return has_bad_size(args.shape) || outside(args.gather, DMDR_GATHER_ALL) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

#if defined(DMDR_EXPORTS)
int64_t dmdr_modulation_workspace(int64_t batch, int64_t rows, int64_t features, int64_t vectors) {
  return batch * dmdr::DMDR_LEVEL::ceil_div(rows, DMDR_NORM_BLOCK) * vectors * features;
}
#endif

DMDR_ENTRY(layer_norm_modulate_fwd, dmdr_layer_norm_modulate_args)
DMDR_ENTRY(layer_norm_modulate_bwd, dmdr_layer_norm_modulate_args)
