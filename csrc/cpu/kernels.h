// What a file of kernels exports. It is compiled once per instruction-set level, into a namespace of that level; behind
// them stand its entries, which are code in the object of the lowest level alone (DMDR_EXPORTS):
//
//   DMDR_ENTRY(renoise_fwd, dmdr_renoise_args)    dmdr_renoise_fwd: check(args), then renoise_fwd(args) of the best level
#pragma once

#include <initializer_list>

#include "dmdr/abi.h"

namespace dmdr {

// Number of the best level that this CPU runs: baseline, v3, v4, v4_bf16. Set at load.
extern const int level;

// In the namespace too: an inline function that all levels share could be the code of the highest.
namespace DMDR_LEVEL {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool has_bad_size(const int64_t *shape) {
  for (int dim = 0; dim <= DMDR_OUTER; ++dim)
    if (shape[dim] < 0) return true;
  return false;
}

inline bool has_bad_dtype(std::initializer_list<dmdr_tensor> tensors) {
  for (const dmdr_tensor &tensor : tensors)
    if (tensor.data != nullptr && (tensor.dtype < DMDR_F32 || tensor.dtype > DMDR_F16)) return true;
  return false;
}

inline bool outside(int64_t value, int64_t last) { return value < 0 || value > last; }

}  // namespace DMDR_LEVEL
}  // namespace dmdr

#define DMDR_KERNEL_OF(level, function, Args) \
  namespace dmdr {                            \
  namespace level {                           \
  void function(const Args &args);            \
  }                                           \
  }
#define DMDR_ENTRY_TO(function, Args, ...)                                                      \
  extern "C" int dmdr_##function(const Args *args, void *) {                                    \
    static constexpr void (*kernels[])(const Args &) = {__VA_ARGS__};                           \
    if (args == nullptr || args->size != (int64_t)sizeof(Args)) return DMDR_ERROR_STRUCT_SIZE;  \
    const dmdr_status status = dmdr::DMDR_LEVEL::check(*args);                                  \
    if (status == DMDR_OK) kernels[dmdr::level](*args);                                         \
    return status;                                                                              \
  }

#if !defined(DMDR_EXPORTS)
#define DMDR_ENTRY(function, Args)
#define DMDR_ENTRY_BF16(function, Args)
#elif !defined(__x86_64__)
#define DMDR_ENTRY(function, Args) DMDR_ENTRY_TO(function, Args, dmdr::baseline::function)
#define DMDR_ENTRY_BF16 DMDR_ENTRY
#else
#define DMDR_ENTRY_AND(function, Args, Last)  \
  DMDR_KERNEL_OF(v3, function, Args)          \
  DMDR_KERNEL_OF(v4, function, Args)          \
  DMDR_ENTRY_TO(function, Args, dmdr::baseline::function, dmdr::v3::function, dmdr::v4::function, Last)
#define DMDR_ENTRY(function, Args) DMDR_ENTRY_AND(function, Args, dmdr::v4::function)
// Of a file that is compiled for v4_bf16 too.
#define DMDR_ENTRY_BF16(function, Args)  \
  DMDR_KERNEL_OF(v4_bf16, function, Args) \
  DMDR_ENTRY_AND(function, Args, dmdr::v4_bf16::function)
#endif
