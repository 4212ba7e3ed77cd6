// What the library says about itself; needs no driver.
#include "launch.h"

extern "C" {

int64_t dmdr_abi_version(void) { return DMDR_ABI_VERSION; }

const char *dmdr_error_string(int status) {
  if (status >= dmdr::kCudaStatus) return cudaGetErrorString(static_cast<cudaError_t>(status - dmdr::kCudaStatus));
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
