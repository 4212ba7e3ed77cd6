// renoise and normal_noise: out = alpha_b x0 + sigma_b noise, the noise given or drawn here.
#include "kernels.h"
#include "parallel.h"
#include "philox.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

constexpr int64_t kPiece = 8192;

template <class Type>
void draw_piece(const dmdr_renoise_args &args, const Position &at, int64_t row, int64_t first, int64_t count,
                int64_t elements) {
  const Row<Type> x0(args.x0, at.offset(args.x0));
  const Output<Type> out(args.out, at.offset(args.out), elements);
  const bool plain = args.x0.data == nullptr;
  const F alpha = splat(plain ? 0.f : args.alpha[at.batch()]), sigma = splat(plain ? 1.f : args.sigma[at.batch()]);
  const uint64_t origin = static_cast<uint64_t>(args.offset) + static_cast<uint64_t>(row) * args.shape[DMDR_OUTER];
  for_normals(Stream(args.seed), origin + first, count, [&](const float *normal, int64_t done, int64_t take) {
    const char *const noise = reinterpret_cast<const char *>(normal);
    for_vectors(0, take, [&](auto where) {
      const auto place = moved(where, first + done);
      const F z = read<Float32>(noise, where);
      out.store(place, plain ? z : alpha * x0.load(place) + sigma * z);
    });
  });
}

template <class Type>
void mix_piece(const dmdr_renoise_args &args, const Position &at, int64_t first, int64_t count, int64_t elements) {
  const Row<Type> x0(args.x0, at.offset(args.x0)), noise(args.noise, at.offset(args.noise));
  const Output<Type> out(args.out, at.offset(args.out), elements);
  const F alpha = splat(args.alpha[at.batch()]), sigma = splat(args.sigma[at.batch()]);
  for_vectors(first, count, [&](auto where) { out.store(where, alpha * x0.load(where) + sigma * noise.load(where)); });
}

}  // namespace

void renoise_fwd(const dmdr_renoise_args &args) {
  const Pieces pieces(args.shape, kPiece);
  with_common_type({&args.x0, &args.noise, &args.out}, [&](auto type) {
    for_items(pieces.items(), pieces.elements(), args.num_threads, [&](int64_t item) {
      const int64_t row = pieces.row(item), first = pieces.first(item), count = pieces.count(item);
      const Position at(args.shape, row);
      if (args.noise.data != nullptr)
        mix_piece<decltype(type)>(args, at, first, count, pieces.elements());
      else
        draw_piece<decltype(type)>(args, at, row, first, count, pieces.elements());
    });
  });
}

void renoise_bwd(const dmdr_renoise_args &args) {
  const Pieces pieces(args.shape, kPiece);
  with_common_type({&args.x0, &args.out}, [&](auto type) {
    using Type = decltype(type);
    for_items(pieces.items(), pieces.elements(), args.num_threads, [&](int64_t item) {
      const Position at(args.shape, pieces.row(item));
      const Row<Type> grad(args.x0, at.offset(args.x0));
      const Output<Type> out(args.out, at.offset(args.out), pieces.elements());
      const F scale = splat(args.alpha[at.batch()]);
      for_vectors(pieces.first(item), pieces.count(item),
                  [&](auto where) { out.store(where, scale * grad.load(where)); });
    });
  });
}

void renoise_scale_bwd(const dmdr_renoise_args &args) {
  const Pieces pieces(args.shape, kRun);
  const int64_t batch = args.shape[0], per_sample = batch == 0 ? 0 : pieces.items() / batch;
  with_common_type({&args.x0, &args.noise}, [&](auto type) {
    using Type = decltype(type);
    for_items(batch, pieces.elements(), args.num_threads, [&](int64_t sample) {
      double total = 0.;
      for (int64_t item = sample * per_sample; item < (sample + 1) * per_sample; ++item) {
        const Position at(args.shape, pieces.row(item));
        const Row<Type> grad(args.x0, at.offset(args.x0)), factor(args.noise, at.offset(args.noise));
        F run = {};
        for_vectors(pieces.first(item), pieces.count(item),
                    [&](auto where) { run += counted(where, grad.load(where) * factor.load(where)); });
        total += sum(run);
      }
      args.sample_sum[sample] = static_cast<float>(total);
    });
  });
}

inline dmdr_status check(const dmdr_renoise_args &args) {
  if (has_bad_dtype({args.x0, args.noise, args.out})) return DMDR_ERROR_DTYPE;
  return has_bad_size(args.shape) || args.offset < 0 ? DMDR_ERROR_ARGUMENT : DMDR_OK;
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr

DMDR_ENTRY(renoise_fwd, dmdr_renoise_args)
DMDR_ENTRY(renoise_bwd, dmdr_renoise_args)
DMDR_ENTRY(renoise_scale_bwd, dmdr_renoise_args)
