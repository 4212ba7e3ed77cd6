// grpo_loss: the clipped policy loss of a handful of log-probs, in fp64.
#include <cmath>

#include "kernels.h"

namespace dmdr {
namespace DMDR_LEVEL {
namespace {

struct Terms {
  double ratio, plain, clipped;
};

// min and max that keep NaN, as torch.clamp and torch.maximum do.
double at_least(double x, double low) { return x < low ? low : x; }
double at_most(double x, double high) { return x > high ? high : x; }

Terms terms(const dmdr_grpo_loss_args &args, int64_t i) {
  const double ratio = std::exp(static_cast<double>(args.logprob[i]) - args.old_logprob[i]);
  const double advantage = at_most(at_least(args.advantage[i], -args.adv_clip), args.adv_clip);
  const double inside = at_most(at_least(ratio, 1. - args.clip_low), 1. + args.clip_high);
  return {ratio, -advantage * ratio, -advantage * inside};
}

}  // namespace

void grpo_loss_fwd(const dmdr_grpo_loss_args &args) {
  double loss = 0., ratio = 0., furthest = 0., outside = 0., change = 0.;
  for (int64_t i = 0; i < args.count; ++i) {
    const Terms term = terms(args, i);
    const double apart = std::fabs(term.ratio - 1.), moved = static_cast<double>(args.logprob[i]) - args.old_logprob[i];
    loss += term.plain >= term.clipped || term.plain != term.plain ? term.plain : term.clipped;
    ratio += term.ratio;
    furthest = apart > furthest || apart != apart ? apart : furthest;
    outside += term.ratio < 1. - args.clip_low || term.ratio > 1. + args.clip_high ? 1. : 0.;
    change += moved * moved;
  }
  const double count = args.count > 0 ? static_cast<double>(args.count) : 1.;
  *args.loss = static_cast<float>(loss / count);
  args.stats[0] = static_cast<float>(ratio / count);
  args.stats[1] = static_cast<float>(furthest);
  args.stats[2] = static_cast<float>(outside / count);
  args.stats[3] = static_cast<float>(0.5 * change / count);
}

void grpo_loss_bwd(const dmdr_grpo_loss_args &args) {
  for (int64_t i = 0; i < args.count; ++i) {
    const Terms term = terms(args, i);
    const double slope = term.plain >= term.clipped ? term.plain : 0.;
    args.grad_logprob[i] = static_cast<float>(slope * *args.grad_loss / static_cast<double>(args.count));
  }
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr
