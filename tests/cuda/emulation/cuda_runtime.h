// The part of CUDA that csrc/cuda uses, on the CPU: for tests of the kernels' results where there is no GPU.
//
// Every thread of a cluster is a fiber; clusters run one after another. A fiber runs until it waits for others, and
// which one is next can be turned around (emulation_configure): a kernel that lacks a barrier then gives other numbers.
// Shared memory starts as NaN and is fenced; a barrier that some thread never reaches, or a shuffle with a lane that has
// left, ends the process with a message. Not emulated: memory ordering, concurrency of clusters, and speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// Aligned as on the device, where a vector at another address is a fault: -fsanitize=alignment ends the process there.
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- what a thread sees ---------------------------------------------------------------------------------------------
namespace emulation {
struct Thread {
  dim3 thread, block, threads, blocks;
  unsigned cluster_rank, cluster_size;
};
const Thread &current();
void *shared_memory();
void *shared_memory_of(const void *local, unsigned rank);
void barrier_block();
void barrier_warp();
void arrive_cluster();
void wait_cluster();
uint32_t exchange(uint32_t word, unsigned from_lane);  // the word that lane `from_lane` of the warp passed
void run(unsigned blocks, unsigned threads, unsigned cluster, size_t shared, const std::function<void()> &kernel);
bool refuses(unsigned cluster, size_t shared);
int max_cluster();

template <dim3 Thread::*kWhich>
struct Index {
  struct {
    operator unsigned() const { return (current().*kWhich).x; }
  } x;
};
}  // namespace emulation

static const emulation::Index<&emulation::Thread::thread> threadIdx = {};
static const emulation::Index<&emulation::Thread::block> blockIdx = {};
static const emulation::Index<&emulation::Thread::threads> blockDim = {};
static const emulation::Index<&emulation::Thread::blocks> gridDim = {};

inline void __syncthreads() { emulation::barrier_block(); }
inline void __syncwarp(uint32_t = 0xffffffffu) { emulation::barrier_warp(); }
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t word, int lanes) {
  return emulation::exchange(word, (threadIdx.x % 32) ^ static_cast<unsigned>(lanes));
}
inline void __threadfence() {}
inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline uint32_t atomicAdd(uint32_t *to, uint32_t x) {
  const uint32_t before = *to;
  *to += x;
  return before;
}
inline double __ldcg(const double *from) { return *from; }
inline float __ldcg(const float *from) { return *from; }
inline unsigned __clusterSizeInBlocks() { return emulation::current().cluster_size; }
inline unsigned __clusterRelativeBlockRank() { return emulation::current().cluster_rank; }
inline void __cluster_barrier_arrive() { emulation::arrive_cluster(); }
inline void __cluster_barrier_arrive_relaxed() { emulation::arrive_cluster(); }
inline void __cluster_barrier_wait() { emulation::wait_cluster(); }
inline void *__cluster_map_shared_rank(const void *local, unsigned rank) {
  return emulation::shared_memory_of(local, rank);
}
inline float __frsqrt_rn(float x) { return static_cast<float>(1. / std::sqrt(static_cast<double>(x))); }

template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

// ---- the runtime ----------------------------------------------------------------------------------------------------
typedef void *cudaStream_t;
typedef enum cudaError { cudaSuccess = 0, cudaErrorInvalidValue = 1 } cudaError_t;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }

enum cudaDeviceAttr { cudaDevAttrClusterLaunch };
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
  return *value = emulation::max_cluster() > 1, cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { struct { unsigned x, y, z; } clusterDim; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;
  unsigned numAttrs;
};
inline unsigned emulated_cluster(const cudaLaunchConfig_t *config) {
  return config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, Kernel, const cudaLaunchConfig_t *config) {
  *clusters = emulation::refuses(emulated_cluster(config), config->dynamicSmemBytes) ? 0 : 1;
  return cudaSuccess;
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Params...), Args... args) {
  const unsigned cluster = emulated_cluster(config);
  if (emulation::refuses(cluster, config->dynamicSmemBytes) || config->gridDim.x % cluster != 0 ||
      config->blockDim.x > 1024 || config->gridDim.x == 0)
    return cudaErrorInvalidValue;
  emulation::run(config->gridDim.x, config->blockDim.x, cluster, config->dynamicSmemBytes, [&] { kernel(args...); });
  return cudaSuccess;
}
