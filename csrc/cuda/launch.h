// Launching from the host: status codes, and which instance of a kernel a call takes.
#pragma once

#include <algorithm>
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

// A launch as the runtime wants it; not copied, for `config` points into it.
class LaunchConfig {
 public:
  LaunchConfig(const Grid &grid, void *stream) : config_(), cluster_() {
    config_.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config_.blockDim = dim3(grid.threads);
    config_.dynamicSmemBytes = grid.shared;
    config_.stream = static_cast<cudaStream_t>(stream);
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim.x = grid.cluster;
    cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
    config_.attrs = &cluster_;
    config_.numAttrs = grid.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig &) = delete;
  const cudaLaunchConfig_t *get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_;
  cudaLaunchAttribute cluster_;
};

// What a kernel must be allowed before it may be launched so.
template <class Params>
cudaError_t allow(void (*kernel)(Params), const Grid &grid) {
  cudaError_t error = cudaSuccess;
  if (grid.shared > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
    // What streams through does not want a cache: room for a second block does more.
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && grid.cluster > kPortableCluster)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// Does this device have room for one such cluster?
template <class Params>
bool has_room(void (*kernel)(Params), const Grid &grid) {
  int clusters = 0;
  const LaunchConfig config(grid, nullptr);
  cudaError_t error = allow(kernel, grid);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, config.get());
  return status_of(error) == DMDR_OK && clusters > 0;
}

template <class Params>
int launch(void (*kernel)(Params), const Grid &grid, void *stream, const Params &params) {
  if (grid.blocks > INT32_MAX) return DMDR_ERROR_ARGUMENT;
  const LaunchConfig config(grid, stream);
  cudaError_t error = allow(kernel, grid);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(config.get(), kernel, params);
  return status_of(error);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int element_bytes(int64_t dtype) { return dtype == DMDR_F32 ? 4 : 2; }

// Does every tensor that is present lie so that vectors start on 16 bytes? Strides of dimensions of size 1 do not count.
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

// An op over [batch, outer..., inner]: fn(Type(), layout); Type is Any unless `fixed`.
template <class Fn>
int with_layout(const int64_t *shape, std::initializer_list<const dmdr_tensor *> tensors, bool fixed, Fn fn) {
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
  const bool whole = fixed && rows == 1 && layout.aligned && layout.inner % width == 0;
  return with_type(dtype, whole, [&](auto type) {
    const int64_t per_row = ceil_div(layout.inner, decltype(type)::kWidth);
    if (rows * per_row > INT32_MAX) return static_cast<int>(DMDR_ERROR_ARGUMENT);
    layout.vectors_per_row = static_cast<uint32_t>(per_row);
    layout.vectors = static_cast<uint32_t>(rows * per_row);
    return fn(type, layout);
  });
}

// Can this device launch clusters? A library built for none of sm_90 and later has kernels that know of none.
inline bool has_clusters() {
#if defined(DMDR_CUDA_CLUSTERS)
  int device = 0, supported = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device) == cudaSuccess && supported != 0;
#else
  return false;
#endif
}

template <class Args>
bool wrong_size(const Args *args) {
  return args == nullptr || args->size != static_cast<int64_t>(sizeof(Args));
}

}  // namespace dmdr
