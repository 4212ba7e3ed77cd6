// gated_activation: GEGLU and SwiGLU, out = value act(gate).
#include "kernels.h"
#include "math.h"
#include "parallel.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

constexpr int64_t kPiece = 4096;

struct Activated {
  F value, slope;  // act(x) and its derivative
};

// x cdf(x) of the normal distribution.
struct Gelu {
  static DMDR_INLINE Activated of(F x) {
    const Normal gauss = normal(x);
    return {x * gauss.cdf, gauss.cdf + x * gauss.density};
  }
};

// 0.5 x (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static DMDR_INLINE Activated of(F x) {
    const F square = x * x;
    const Sigmoid gate = sigmoid(x * (1.5957691216057308f + 0.07135481282552f * square));
    const F slope = 1.5957691216057308f + 0.21406443847656f * square;
    return {x * gate.value, gate.value + x * (gate.value * gate.rest) * slope};
  }
};

struct Silu {
  static DMDR_INLINE Activated of(F x) {
    const Sigmoid gate = sigmoid(x);
    return {x * gate.value, gate.value + x * (gate.value * gate.rest)};
  }
};

template <class Run>
void with_activation(int64_t activation, Run run) {
  if (activation == DMDR_GELU) return run(Gelu{});
  if (activation == DMDR_GELU_TANH) return run(GeluTanh{});
  run(Silu{});
}

}  // namespace

void gated_activation_fwd(const dmdr_gated_activation_args &args) {
  const Pieces pieces(args.shape, kPiece);
  with_common_type({&args.value, &args.gate, &args.out}, [&](auto type) {
    with_activation(args.activation, [&](auto activation) {
      using Type = decltype(type);
      using Act = decltype(activation);
      for_items(pieces.items(), pieces.elements(), args.num_threads, [&](int64_t item) {
        const Position at(args.shape, pieces.row(item));
        const Row<Type> value(args.value, at.offset(args.value)), gate(args.gate, at.offset(args.gate));
        const Output<Type> out(args.out, at.offset(args.out), pieces.elements());
        for_vectors(pieces.first(item), pieces.count(item), [&](auto where) {
          out.store(where, value.load(where) * Act::of(gate.load(where)).value);
        });
      });
    });
  });
}

void gated_activation_bwd(const dmdr_gated_activation_args &args) {
  const Pieces pieces(args.shape, kPiece);
  with_common_type({&args.value, &args.gate, &args.grad, &args.grad_value, &args.grad_gate}, [&](auto type) {
    with_activation(args.activation, [&](auto activation) {
      using Type = decltype(type);
      using Act = decltype(activation);
      for_items(pieces.items(), pieces.elements(), args.num_threads, [&](int64_t item) {
        const Position at(args.shape, pieces.row(item));
        const Row<Type> value(args.value, at.offset(args.value)), gate(args.gate, at.offset(args.gate));
        const Row<Type> grad(args.grad, at.offset(args.grad));
        const Output<Type> grad_value(args.grad_value, at.offset(args.grad_value), pieces.elements());
        const Output<Type> grad_gate(args.grad_gate, at.offset(args.grad_gate), pieces.elements());
        for_vectors(pieces.first(item), pieces.count(item), [&](auto where) {
          const Activated act = Act::of(gate.load(where));
          const F g = grad.load(where);
          grad_value.store(where, g * act.value);
          grad_gate.store(where, g * value.load(where) * act.slope);
        });
      });
    });
  });
}

inline dmdr_status check(const dmdr_gated_activation_args &args) {
  if (has_bad_dtype({args.value, args.gate, args.out, args.grad, args.grad_value, args.grad_gate}))
    return DMDR_ERROR_DTYPE;
  return has_bad_size(args.shape) || outside(args.activation, DMDR_SILU) ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

DMDR_ENTRY(gated_activation_fwd, dmdr_gated_activation_args)
DMDR_ENTRY(gated_activation_bwd, dmdr_gated_activation_args)
