// Launching from the host: status codes, and which instance of a kernel a call takes.
#pragma once

#include <initializer_list>

#include "layout.cuh"

namespace dmdr {

// Statuses from here on are this + a cudaError_t.
constexpr int kCudaStatus = 1000;

inline int status_of(cudaError_t error) {
  if (error == cudaSuccess) return DMDR_OK;
  cudaGetLastError();  // the caller hears of it; the next call must not
  return kCudaStatus + static_cast<int>(error);
}

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared = 0;  // bytes
  int cluster = 1;    // blocks
};

constexpr size_t kSharedWithoutAsking = 48 << 10;
constexpr int kPortableCluster = 8;

template <class Params>
int launch(void (*kernel)(Params), const Grid &grid, void *stream, const Params &params) {
  if (grid.blocks == 0) return DMDR_OK;
  if (grid.blocks > INT32_MAX) return DMDR_ERROR_ARGUMENT;
  if (grid.shared > kSharedWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
    if (error != cudaSuccess) return status_of(error);
  }
  if (grid.cluster > kPortableCluster) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return status_of(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return status_of(cudaLaunchKernelEx(&config, kernel, params));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int element_bytes(int64_t dtype) { return dtype == DMDR_F32 ? 4 : 2; }

// Does every tensor that is present lie so that vectors start on 16 bytes? `used` says which strides count.
inline bool all_aligned(std::initializer_list<const dmdr_tensor *> tensors, const int64_t *sizes, int dims) {
  for (const dmdr_tensor *tensor : tensors) {
    if (tensor->data == nullptr) continue;
    if (reinterpret_cast<uintptr_t>(tensor->data) % kAccessBytes != 0) return false;
    for (int dim = 0; dim < dims; ++dim)
      if (sizes[dim] > 1 && tensor->stride[dim] * element_bytes(tensor->dtype) % kAccessBytes != 0) return false;
  }
  return true;
}

// The dtype that all present tensors share, or -1.
inline int64_t common_dtype(std::initializer_list<const dmdr_tensor *> tensors) {
  int64_t common = -2;
  for (const dmdr_tensor *tensor : tensors) {
    if (tensor->data == nullptr) continue;
    if (common == -2) common = tensor->dtype;
    if (common != tensor->dtype) return -1;
  }
  return common;
}

inline bool known_dtypes(std::initializer_list<const dmdr_tensor *> tensors) {
  for (const dmdr_tensor *tensor : tensors)
    if (tensor->data != nullptr && (tensor->dtype < DMDR_F32 || tensor->dtype > DMDR_F16)) return false;
  return true;
}

// fn(Type()) with the one dtype of a call that has whole aligned vectors, Any for all others.
template <class Fn>
int with_type(int64_t dtype, bool whole, Fn fn) {
  if (whole && dtype == DMDR_F32) return fn(Float32());
  if (whole && dtype == DMDR_BF16) return fn(Bfloat16());
  if (whole && dtype == DMDR_F16) return fn(Float16());
  return fn(Any());
}

// An op over [batch, outer..., inner]: fn(Type(), layout). `multiple`: a fixed type also needs inner to be one of it.
template <class Fn>
int with_layout(const int64_t *shape, std::initializer_list<const dmdr_tensor *> tensors, Fn fn) {
  if (!known_dtypes(tensors)) return DMDR_ERROR_DTYPE;
  Layout layout = {};
  layout.batch = shape[0];
  layout.inner = shape[DMDR_OUTER];
  int64_t rows = 1;
  for (int dim = 1; dim < DMDR_OUTER; ++dim) {
    if (shape[dim] < 0 || shape[dim] > INT32_MAX) return DMDR_ERROR_ARGUMENT;
    layout.outer[dim - 1] = static_cast<uint32_t>(shape[dim]);
    rows *= shape[dim];
  }
  if (layout.batch < 0 || layout.inner < 0) return DMDR_ERROR_ARGUMENT;
  layout.sample = rows * layout.inner;
  if (layout.batch * layout.sample == 0) return DMDR_OK;
  layout.aligned = all_aligned(tensors, shape, DMDR_OUTER);
  const int64_t dtype = common_dtype(tensors);
  const int64_t width = dtype == DMDR_F32 ? Float32::kWidth : Bfloat16::kWidth;
  const bool whole = rows == 1 && layout.aligned && layout.inner % width == 0;
  return with_type(dtype, whole, [&](auto type) {
    const int64_t per_row = ceil_div(layout.inner, decltype(type)::kWidth);
    if (rows * per_row > INT32_MAX) return static_cast<int>(DMDR_ERROR_ARGUMENT);
    layout.vectors_per_row = static_cast<uint32_t>(per_row);
    layout.vectors = static_cast<uint32_t>(rows * per_row);
    return fn(type, layout);
  });
}

template <class Args>
bool wrong_size(const Args *args) {
  return args == nullptr || args->size != static_cast<int64_t>(sizeof(Args));
}

}  // namespace dmdr
