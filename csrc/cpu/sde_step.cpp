// sde_step: x' = a x + b v + s n with the log-probability of x', and the gradients of both.
//
// A drawn x' is stored first and read back for the log-prob, in the same order of sums as a given one: replaying a step
// gives the same bits.
#include <cmath>

#include "kernels.h"
#include "parallel.h"
#include "philox.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

constexpr int64_t kPiece = DMDR_SDE_BLOCK;
constexpr int64_t kInL1 = 1024;  // elements whose mean and x' are still in L1 when the log-prob reads them back

struct Coefficients {
  double a, b, std;
};

Coefficients coefficients(const dmdr_sde_step_args &args, int64_t sample) {
  const double t = args.sigma[sample], next = args.sigma_next[sample];
  if (args.kind == DMDR_SDE_CPS) {
    const double angle = args.eta * 1.5707963267948966, keep = next * std::cos(angle);
    return {(1. - next) + keep, -t * (1. - next) + (1. - t) * keep, next * std::sin(angle)};
  }
  const double dt = next - t;
  // t = 1 takes t' in the denominator only.
  const double gamma = args.kind == DMDR_SDE_DANCE ? args.eta : args.eta * std::sqrt(t / (1. - (t == 1. ? next : t)));
  const double drift = gamma * gamma / (2. * t);
  return {1. + drift * dt, dt * (1. + drift * (1. - t)), gamma * std::sqrt(-dt)};
}

template <class Type>
void write_mean(const dmdr_sde_step_args &args, const Position &at, const Coefficients &step, int64_t first,
                int64_t count) {
  const Row<Type> x(args.x, at.offset(args.x)), v(args.v, at.offset(args.v));
  const Row<Float32> mean(args.mean, at.offset(args.mean));
  const F a = splat(static_cast<float>(step.a)), b = splat(static_cast<float>(step.b));
  for_vectors(first, count, [&](auto where) { mean.store(where, a * x.load(where) + b * v.load(where)); });
}

// x' = mean + s n for a piece; whole draws from their place in the stream, as in renoise.
template <class Type>
void draw_next(const dmdr_sde_step_args &args, const Position &at, const Coefficients &step, int64_t row, int64_t first,
               int64_t count) {
  const Row<Float32> mean(args.mean, at.offset(args.mean));
  const Row<Type> next(args.next_sample, at.offset(args.next_sample));
  const F std = splat(static_cast<float>(step.std));
  const uint64_t origin = static_cast<uint64_t>(args.offset) + static_cast<uint64_t>(row) * args.shape[DMDR_OUTER];
  for_normals(Stream(args.seed), origin + first, count, [&](const float *normal, int64_t done, int64_t take) {
    const char *const noise = reinterpret_cast<const char *>(normal);
    for_vectors(0, take, [&](auto where) {
      const auto place = moved(where, first + done);
      next.store(place, mean.load(place) + std * read<Float32>(noise, where));
    });
  });
}

// The mean of a piece for a given x', and the sum of squares about it: in the order of sum_square.
template <class Type>
double replay(const dmdr_sde_step_args &args, const Position &at, const Coefficients &step, int64_t first,
              int64_t count, int64_t elements) {
  const Row<Type> x(args.x, at.offset(args.x)), v(args.v, at.offset(args.v));
  const Row<Type> next(args.next_sample, at.offset(args.next_sample));
  const Output<Float32> mean(args.mean, at.offset(args.mean), elements);
  const F a = splat(static_cast<float>(step.a)), b = splat(static_cast<float>(step.b));
  F square = {};
  for_vectors(first, count, [&](auto where) {
    const F value = a * x.load(where) + b * v.load(where), apart = next.load(where) - value;
    mean.store(where, value);
    square += counted(where, apart * apart);
  });
  return sum(square);
}

template <class Type>
double sum_square(const dmdr_sde_step_args &args, const Position &at, int64_t first, int64_t count) {
  const Row<Float32> mean(args.mean, at.offset(args.mean));
  const Row<Type> next(args.next_sample, at.offset(args.next_sample));
  F square = {};
  for_vectors(first, count, [&](auto where) {
    const F apart = next.load(where) - mean.load(where);
    square += counted(where, apart * apart);
  });
  return sum(square);
}

}  // namespace

void sde_step_fwd(const dmdr_sde_step_args &args) {
  const Pieces pieces(args.shape, kPiece);
  const int64_t batch = args.shape[0], per_sample = batch == 0 ? 0 : pieces.items() / batch;
  with_common_type({&args.x, &args.v, &args.next_sample}, [&](auto type) {
    using Type = decltype(type);
    for_items(pieces.items(), pieces.elements(), args.num_threads, [&](int64_t item) {
      const int64_t row = pieces.row(item), first = pieces.first(item), count = pieces.count(item);
      const Position at(args.shape, row);
      const Coefficients step = coefficients(args, at.batch());
      double square = 0.;
      for (int64_t done = 0; done < count; done += kInL1) {
        const int64_t begin = first + done, some = count - done < kInL1 ? count - done : kInL1;
        if (args.seed == nullptr) {
          square += replay<Type>(args, at, step, begin, some, pieces.elements());
        } else {
          write_mean<Type>(args, at, step, begin, some);
          draw_next<Type>(args, at, step, row, begin, some);
          square += sum_square<Type>(args, at, begin, some);
        }
      }
      args.workspace[item] = square;
    });
  });
  const double elements = batch == 0 ? 0. : static_cast<double>(pieces.elements() / batch);
  for (int64_t sample = 0; sample < batch; ++sample) {
    const double std = coefficients(args, sample).std;
    double square = 0.;
    for (int64_t item = sample * per_sample; item < (sample + 1) * per_sample; ++item) square += args.workspace[item];
    square /= elements;
    args.std[sample] = static_cast<float>(std);
    args.logprob[sample] = static_cast<float>(
        args.kind == DMDR_SDE_CPS ? -square : -square / (2. * std * std) - std::log(std) - 0.9189385332046727);
  }
}

void sde_step_bwd(const dmdr_sde_step_args &args) {
  const Pieces pieces(args.shape, kPiece);
  const double elements = args.shape[0] == 0 ? 0. : static_cast<double>(pieces.elements() / args.shape[0]);
  const bool through_logprob = args.grad_logprob != nullptr;
  with_common_type(
      {&args.x, &args.v, &args.next_sample, &args.grad_next, &args.grad_mean, &args.grad_x, &args.grad_v},
      [&](auto type) {
        using Type = decltype(type);
        for_items(pieces.items(), pieces.elements(), args.num_threads, [&](int64_t item) {
          const Position at(args.shape, pieces.row(item));
          const Coefficients step = coefficients(args, at.batch());
          const F a = splat(static_cast<float>(step.a)), b = splat(static_cast<float>(step.b));
          const double per_square = args.kind == DMDR_SDE_CPS ? 2. : 1. / (step.std * step.std);
          const F slope =
              splat(through_logprob ? static_cast<float>(args.grad_logprob[at.batch()] * per_square / elements) : 0.f);
          const Row<Type> x(args.x, at.offset(args.x)), v(args.v, at.offset(args.v));
          const Row<Type> next(args.next_sample, at.offset(args.next_sample));
          const Row<Type> grad_next(args.grad_next, at.offset(args.grad_next));
          const Row<Type> grad_mean(args.grad_mean, at.offset(args.grad_mean));
          const Output<Type> grad_x(args.grad_x, at.offset(args.grad_x), pieces.elements());
          const Output<Type> grad_v(args.grad_v, at.offset(args.grad_v), pieces.elements());
          for_vectors(pieces.first(item), pieces.count(item), [&](auto where) {
            F g = {};
            if (grad_next.base != nullptr) g += grad_next.load(where);
            if (grad_mean.base != nullptr) g += grad_mean.load(where);
            if (through_logprob) g += slope * (next.load(where) - (a * x.load(where) + b * v.load(where)));
            if (grad_x.base != nullptr) grad_x.store(where, a * g);
            if (grad_v.base != nullptr) grad_v.store(where, b * g);
          });
        });
      });
}

inline dmdr_status check(const dmdr_sde_step_args &args) {
  if (has_bad_dtype({args.x, args.v, args.next_sample, args.mean, args.grad_next, args.grad_mean, args.grad_x,
                     args.grad_v}))
    return DMDR_ERROR_DTYPE;
  const bool bad = has_bad_size(args.shape) || args.offset < 0 || outside(args.kind, DMDR_SDE_CPS);
  return bad ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

#if defined(DMDR_EXPORTS)
int64_t dmdr_sde_step_workspace(int64_t outer_rows, int64_t inner) {
  return outer_rows * dmdr::DMDR_LEVEL::ceil_div(inner, DMDR_SDE_BLOCK);
}
#endif

DMDR_ENTRY(sde_step_fwd, dmdr_sde_step_args)
DMDR_ENTRY(sde_step_bwd, dmdr_sde_step_args)
