// out = factor in, the factor per sample or the product of two device scalars: the gradients of renoise and dmd_loss.
#pragma once

#include "dmdr/abi.h"

namespace dmdr {

// per_sample: [batch], or null for *first * *second. Returns a status.
int scale(const int64_t *shape, const dmdr_tensor &in, const dmdr_tensor &out, const float *per_sample,
          const float *first, const float *second, void *stream);

}  // namespace dmdr
