// Which level of the kernels this CPU runs, and what the library says about itself.
#include <cstdlib>
#include <cstring>

#include "dmdr/abi.h"

namespace dmdr {
namespace {

const char *const kNames[] = {"baseline", "v3", "v4", "v4_bf16"};

// DMDR_CPU_LEVEL=baseline|v3|v4|v4_bf16 lowers the level (to reproduce an older machine's bits); read once, at load.
int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const char *limit = std::getenv("DMDR_CPU_LEVEL");
  const auto allows = [limit](const char *name) { return limit == nullptr || std::strcmp(limit, name) >= 0; };
  // "baseline" < "v3" < "v4" < "v4_bf16", also as strings. The features are those that x86-64-v3 and -v4
  // add and that compilers name.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && __builtin_cpu_supports("avx512bf16") && allows("v4_bf16")) return 3;
  if (v4 && allows("v4")) return 2;
  if (v3 && allows("v3")) return 1;
#endif
  return 0;
}

}  // namespace

extern const int level;  // else it would be this file's own
const int level = best_level();

}  // namespace dmdr

extern "C" {

int64_t dmdr_abi_version(void) { return DMDR_ABI_VERSION; }

const char *dmdr_cpu_level(void) { return dmdr::kNames[dmdr::level]; }

const char *dmdr_error_string(int status) {
  switch (status) {
    case DMDR_OK: return "no error";
    case DMDR_ERROR_STRUCT_SIZE: return "the argument struct has another size than this library's";
    case DMDR_ERROR_DTYPE: return "a tensor's dtype is none of float32, bfloat16 and float16";
    case DMDR_ERROR_ARGUMENT: return "a size, mode or pointer is outside what the kernel can work with";
    case DMDR_ERROR_LAUNCH: return "the device refused the kernel";
  }
  return "an unknown status";
}

}  // extern "C"
