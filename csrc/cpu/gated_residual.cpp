// gated_residual: residual = x + gate h, alone or followed by layer_norm_modulate of the rounded residual.
#include "kernels.h"
#include "modulated_norm.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

// The rows of one (sample, row) of every tensor of the op.
template <class Type>
struct Rows {
  Row<Type> x, h, gate, shift, scale, residual;
  Output<Type> alone, y;  // `alone`: the residual where no norm reads it back
  Row<Type> grad_residual, grad_y;
  Output<Type> grad_x, grad_h;
  Row<Type> grad_gate, grad_shift, grad_scale;
  DMDR_INLINE Rows(const dmdr_gated_residual_args &args, int64_t b, int64_t t, int64_t elements)
      : x(args.x, at_row(args.x, b, t)), h(args.h, at_row(args.h, b, t)), gate(args.gate, at_row(args.gate, b, t)),
        shift(args.shift, at_row(args.shift, b, t)), scale(args.scale, at_row(args.scale, b, t)),
        residual(args.residual, at_row(args.residual, b, t)),
        alone(args.residual, at_row(args.residual, b, t), elements), y(args.y, at_row(args.y, b, t), elements),
        grad_residual(args.grad_residual, at_row(args.grad_residual, b, t)),
        grad_y(args.grad_y, at_row(args.grad_y, b, t)), grad_x(args.grad_x, at_row(args.grad_x, b, t), elements),
        grad_h(args.grad_h, at_row(args.grad_h, b, t), elements), grad_gate(args.grad_gate, at_row(args.grad_gate, b, t)),
        grad_shift(args.grad_shift, at_row(args.grad_shift, b, t)),
        grad_scale(args.grad_scale, at_row(args.grad_scale, b, t)) {}
};

}  // namespace

void gated_residual_fwd(const dmdr_gated_residual_args &args) {
  const int64_t rows = args.shape[1], count = args.shape[DMDR_OUTER], elements = args.shape[0] * rows * count;
  const bool normalises = args.y.data != nullptr;
  with_common_type({&args.x, &args.h, &args.gate, &args.shift, &args.scale, &args.residual, &args.y}, [&](auto type) {
    using Type = decltype(type);
    for_items(args.shape[0] * rows, elements, args.num_threads, [&](int64_t item) {
      const Rows<Type> of(args, item / rows, item % rows, elements);
      const auto residual = [&](auto where)
          __attribute__((always_inline)) { return of.x.load(where) + of.gate.load(where) * of.h.load(where); };
      if (!normalises) return for_vectors(0, count, [&](auto where) { of.alone.store(where, residual(where)); });
      for_vectors(0, count, [&](auto where) { of.residual.store(where, residual(where)); });
      const Moments norm = moments(of.residual, count, args.eps);
      args.mean[item] = norm.mean;
      args.rstd[item] = norm.rstd;
      modulate(of.residual, norm, of.shift, of.scale, of.y, count);
    });
  });
}

void gated_residual_bwd(const dmdr_gated_residual_args &args) {
  const int64_t count = args.shape[DMDR_OUTER], stride = 3 * count;
  const RowBlocks blocks(args.shape);
  const int64_t elements = blocks.batch * blocks.rows * count;
  const bool through_y = args.grad_y.data != nullptr, through_residual = args.grad_residual.data != nullptr;
  const bool to_x = args.grad_x.data != nullptr, to_h = args.grad_h.data != nullptr;
  with_common_type(
      {&args.h, &args.gate, &args.scale, &args.residual, &args.grad_residual, &args.grad_y, &args.grad_x, &args.grad_h,
       &args.grad_gate, &args.grad_shift, &args.grad_scale},
      [&](auto type) {
        using Type = decltype(type);
        for_items(blocks.items(), elements, args.num_threads, [&](int64_t item) {
          float *const space = args.workspace + item * stride;
          const VectorSum<Type> gate_sum(args.gather_gate, space, count);
          const VectorSum<Type> shift_sum(args.gather, space + count, count);
          const VectorSum<Type> scale_sum(args.gather, space + 2 * count, count);
          const int64_t sample = blocks.sample(item);
          for (int64_t row = blocks.first(item); row < blocks.first(item) + blocks.count(item); ++row) {
            const Rows<Type> of(args, sample, row, elements);
            float mean = 0.f, rstd = 0.f, along = 0.f, across = 0.f;
            if (through_y) {
              mean = args.mean[sample * blocks.rows + row];
              rstd = args.rstd[sample * blocks.rows + row];
              const TwoSums sums = sum_row(count, [&](auto where) {
                const F g = of.grad_y.load(where), normal = (of.residual.load(where) - mean) * rstd;
                shift_sum.add(where, g, of.grad_shift);
                scale_sum.add(where, g * normal, of.grad_scale);
                const F to_normal = g * (1.f + of.scale.load(where));
                return Pair{to_normal, to_normal * normal};
              });
              along = sums.first / count;
              across = sums.second / count;
            }
            for_vectors(0, count, [&](auto where) {
              F g = through_residual ? of.grad_residual.load(where) : F{};
              if (through_y) {
                const F normal = (of.residual.load(where) - mean) * rstd;
                g += rstd * (of.grad_y.load(where) * (1.f + of.scale.load(where)) - along - normal * across);
              }
              if (to_x) of.grad_x.store(where, g);
              if (to_h) of.grad_h.store(where, g * of.gate.load(where));
              if (args.gather_gate != kNone) gate_sum.add(where, g * of.h.load(where), of.grad_gate);
            });
          }
        });
        const auto gather = [&](const dmdr_tensor &out, int64_t how, int64_t at) {
          gather_blocks<Type>(out, how, blocks, args.workspace, stride, at, count, args.num_threads);
        };
        gather(args.grad_gate, args.gather_gate, 0);
        gather(args.grad_shift, args.gather, count);
        gather(args.grad_scale, args.gather, 2 * count);
      });
}

inline dmdr_status check(const dmdr_gated_residual_args &args) {
  if (has_bad_dtype({args.x, args.h, args.gate, args.shift, args.scale, args.residual, args.y, args.grad_residual,
                     args.grad_y, args.grad_x, args.grad_h, args.grad_gate, args.grad_shift, args.grad_scale}))
    return DMDR_ERROR_DTYPE;
  const bool bad = outside(args.gather, DMDR_GATHER_ALL) || outside(args.gather_gate, DMDR_GATHER_ALL);
  return bad || has_bad_size(args.shape) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

DMDR_ENTRY(gated_residual_fwd, dmdr_gated_residual_args)
DMDR_ENTRY(gated_residual_bwd, dmdr_gated_residual_args)
