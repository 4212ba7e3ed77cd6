// qk_norm_rope: RMS norm of every head's row and its rotation, for queries and keys.
//
//   y = x rstd w;  out = y cos + rot(y) sin;  rot (y0, y1) -> (-y1, y0) over neighbours (interleaved) or halves
#include "kernels.h"
#include "modulated_norm.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

// Lanes swapped within neighbouring pairs, the first of a pair negated: rot, interleaved. Its transpose is -rot.
DMDR_INLINE F rotate_pairs(F y) {
  I swap;
  U sign;
  for (int lane = 0; lane < kLanes; ++lane) {
    swap[lane] = lane ^ 1;
    sign[lane] = lane % 2 == 0 ? 0x80000000u : 0u;
  }
  return from_bits(bits(__builtin_shuffle(y, swap)) ^ sign);
}

// A row's factors of the rotation; absent without cos.
template <class Type>
struct Angles {
  Row<Type> cos, sin;
  bool present, interleaved;
  int64_t half;
  DMDR_INLINE Angles(const dmdr_qk_norm_rope_args &args, int64_t sample, int64_t row)
      : cos(args.cos, at_row(args.cos, sample, row)), sin(args.sin, at_row(args.sin, sample, row)),
        present(args.cos.data != nullptr), interleaved(args.interleaved != 0), half(args.features / 2) {}
};

// out(where, y cos + rot(y) sin) for a row y(where).
template <class Type, class Y, class Out>
DMDR_INLINE void rotate(const Angles<Type> &angles, int64_t count, Y y, Out out) {
  if (!angles.present) {
    for_vectors(0, count, [&](auto where) { out(where, y(where)); });
  } else if (angles.interleaved) {
    for_vectors(0, count, [&](auto where) {
      const F value = y(where);
      out(where, value * angles.cos.load(where) + rotate_pairs(value) * angles.sin.load(where));
    });
  } else {
    for_vectors(0, angles.half, [&](auto where) {
      const auto second = moved(where, angles.half);
      const F y0 = y(where), y1 = y(second);
      out(where, y0 * angles.cos.load(where) - y1 * angles.sin.load(where));
      out(second, y1 * angles.cos.load(second) + y0 * angles.sin.load(second));
    });
  }
}

// The transpose of rotate: g cos - rot(g sin).
template <class Type, class G, class Out>
DMDR_INLINE void rotate_back(const Angles<Type> &angles, int64_t count, G g, Out out) {
  if (!angles.present) {
    for_vectors(0, count, [&](auto where) { out(where, g(where)); });
  } else if (angles.interleaved) {
    for_vectors(0, count, [&](auto where) {
      const F value = g(where);
      out(where, value * angles.cos.load(where) - rotate_pairs(value * angles.sin.load(where)));
    });
  } else {
    for_vectors(0, angles.half, [&](auto where) {
      const auto second = moved(where, angles.half);
      const F g0 = g(where), g1 = g(second);
      out(where, g0 * angles.cos.load(where) + g1 * angles.sin.load(second));
      out(second, g1 * angles.cos.load(second) - g0 * angles.sin.load(where));
    });
  }
}

template <class Type>
DMDR_INLINE Row<Type> head_row(const dmdr_tensor &tensor, int64_t sample, int64_t row, int64_t head) {
  return Row<Type>(tensor, at_row(tensor, sample, row) + head * tensor.stride[2]);
}

template <class Type>
void forward_token(const dmdr_qk_norm_rope_args &args, const dmdr_qk_side &side, int64_t sample, int64_t row) {
  const Angles<Type> angles(args, sample, row);
  const Row<Type> weight(side.weight, 0);
  const bool weighted = side.weight.data != nullptr;
  for (int64_t head = 0; head < side.heads; ++head) {
    const Row<Type> x = head_row<Type>(side.x, sample, row, head), out = head_row<Type>(side.out, sample, row, head);
    const float square = sum_row(args.features, [&](auto where) {
                           const F value = x.load(where);
                           return Pair{value * value, F{}};
                         }).first;
    const double mean = static_cast<double>(square) / static_cast<double>(args.features);
    const float rstd = static_cast<float>(1. / __builtin_sqrt(mean + args.eps));
    side.rstd[(sample * args.rows + row) * side.heads + head] = rstd;
    rotate(
        angles, args.features,
        [&](auto where) __attribute__((always_inline)) {
          const F normal = x.load(where) * rstd;
          return weighted ? normal * weight.load(where) : normal;
        },
        [&](auto where, F y) __attribute__((always_inline)) { out.store(where, y); });
  }
}

template <class Type>
void backward_token(const dmdr_qk_norm_rope_args &args, const dmdr_qk_side &side, int64_t sample, int64_t row,
                    char *weight_sum) {
  const Angles<Type> angles(args, sample, row);
  const Row<Type> weight(side.weight, 0);
  const bool weighted = side.weight.data != nullptr, sums_weight = side.grad_weight != nullptr;
  alignas(64) float turned[DMDR_ROPE_FEATURES], of_heads[DMDR_ROPE_FEATURES];
  char *const turned_row = reinterpret_cast<char *>(turned), *const heads_sum = reinterpret_cast<char *>(of_heads);
  if (sums_weight) std::memset(of_heads, 0, args.features * 4);
  for (int64_t head = 0; head < side.heads; ++head) {
    const Row<Type> x = head_row<Type>(side.x, sample, row, head), grad = head_row<Type>(side.grad, sample, row, head);
    const Row<Type> grad_x = head_row<Type>(side.grad_x, sample, row, head);
    const float rstd = side.rstd[(sample * args.rows + row) * side.heads + head];
    rotate_back(
        angles, args.features, [&](auto where) __attribute__((always_inline)) { return grad.load(where); },
        [&](auto where, F g) __attribute__((always_inline)) { write<Float32>(turned_row, where, g); });
    const float along = sum_row(args.features, [&](auto where) {
                          const F normal = x.load(where) * rstd;
                          F g = read<Float32>(turned_row, where);
                          if (sums_weight)
                            write<Float32>(heads_sum, where, read<Float32>(heads_sum, where) + g * normal);
                          if (weighted) {
                            g *= weight.load(where);
                            write<Float32>(turned_row, where, g);
                          }
                          return Pair{g * normal, F{}};
                        }).first / static_cast<float>(args.features);
    for_vectors(0, args.features, [&](auto where) {
      grad_x.store(where, rstd * (read<Float32>(turned_row, where) - x.load(where) * rstd * along));
    });
  }
  // A token's sum is added as one number: the rounding errors of a sum grow with its length.
  if (sums_weight)
    for_vectors(0, args.features, [&](auto where) {
      write<Float32>(weight_sum, where, read<Float32>(weight_sum, where) + read<Float32>(heads_sum, where));
    });
}

template <class Type>
void backward_side(const dmdr_qk_norm_rope_args &args, const dmdr_qk_side &side, float *workspace) {
  const int64_t shape[2] = {args.batch, args.rows};
  const RowBlocks blocks(shape);
  const int64_t features = args.features;
  for_items(blocks.items(), args.batch * args.rows * side.heads * features, args.num_threads, [&](int64_t item) {
    float *const sums = workspace + item * features;
    if (side.grad_weight != nullptr) std::memset(sums, 0, features * 4);
    for (int64_t row = blocks.first(item); row < blocks.first(item) + blocks.count(item); ++row)
      backward_token<Type>(args, side, blocks.sample(item), row, reinterpret_cast<char *>(sums));
  });
  if (side.grad_weight == nullptr) return;
  for (int64_t i = 0; i < features; ++i) {
    double total = 0.;
    for (int64_t item = 0; item < blocks.items(); ++item) total += workspace[item * features + i];
    side.grad_weight[i] = static_cast<float>(total);
  }
}

}  // namespace

void qk_norm_rope_fwd(const dmdr_qk_norm_rope_args &args) {
  const dmdr_qk_side &q = args.q, &k = args.k;
  with_common_type({&q.x, &k.x, &q.weight, &k.weight, &args.cos, &args.sin, &q.out, &k.out}, [&](auto type) {
    const int64_t tokens = args.batch * args.rows;
    for_items(tokens, tokens * (q.heads + k.heads) * args.features, args.num_threads, [&](int64_t token) {
      forward_token<decltype(type)>(args, q, token / args.rows, token % args.rows);
      forward_token<decltype(type)>(args, k, token / args.rows, token % args.rows);
    });
  });
}

void qk_norm_rope_bwd(const dmdr_qk_norm_rope_args &args) {
  for (const dmdr_qk_side *side : {&args.q, &args.k}) {
    if (side->grad.data == nullptr && side->grad_weight == nullptr) continue;  // an empty batch has no data either
    with_common_type({&side->x, &side->weight, &args.cos, &args.sin, &side->grad, &side->grad_x}, [&](auto type) {
      backward_side<decltype(type)>(args, *side, args.workspace);
    });
  }
}

inline dmdr_status check(const dmdr_qk_norm_rope_args &args) {
  if (has_bad_dtype({args.cos, args.sin})) return DMDR_ERROR_DTYPE;
  bool bad = args.batch < 0 || args.rows < 0 || args.features <= 0;
  for (const dmdr_qk_side *side : {&args.q, &args.k}) {
    if (has_bad_dtype({side->x, side->weight, side->out, side->grad, side->grad_x})) return DMDR_ERROR_DTYPE;
    bad = bad || side->heads < 0 || (side->grad.data != nullptr && args.features > DMDR_ROPE_FEATURES);
  }
  return bad || (args.cos.data != nullptr && args.features % 2 != 0) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

#if defined(DMDR_EXPORTS)
int64_t dmdr_qk_norm_rope_workspace(int64_t batch, int64_t rows, int64_t features) {
  return batch * dmdr::DMDR_LEVEL::ceil_div(rows, DMDR_NORM_BLOCK) * features;
}
#endif

DMDR_ENTRY(qk_norm_rope_fwd, dmdr_qk_norm_rope_args)
DMDR_ENTRY(qk_norm_rope_bwd, dmdr_qk_norm_rope_args)
