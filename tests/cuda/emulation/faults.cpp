// Kernels that are wrong, each in its own way: the emulation must not let them pass. `faults NAME` runs one.
#include <cuda_runtime.h>

#include <cstring>

extern "C" void emulation_configure(int64_t most_cluster, int64_t reversed);

namespace {

struct Params {
  int *out;
};

int *shared_ints() { return static_cast<int *>(emulation::shared_memory()); }

// Reads what another thread writes without waiting for it.
void missing_barrier(Params p) {
  int *const shared = shared_ints();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  p.out[threadIdx.x] = shared[63 - threadIdx.x];
}
// The same, right.
void with_barrier(Params p) {
  int *const shared = shared_ints();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  p.out[threadIdx.x] = shared[63 - threadIdx.x];
}
// Reads another block's shared memory that may not have been written yet.
void missing_cluster_barrier(Params p) {
  int *const shared = shared_ints();
  shared[threadIdx.x] = static_cast<int>(__clusterRelativeBlockRank());
  int *const other = static_cast<int *>(__cluster_map_shared_rank(shared, 1 - __clusterRelativeBlockRank()));
  if (__clusterRelativeBlockRank() == 0) p.out[threadIdx.x] = other[threadIdx.x];
}
void beyond_shared_memory(Params) { shared_ints()[64 + threadIdx.x] = 0; }
void divergent_barrier(Params) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) __syncwarp();
  __syncthreads();
  if (threadIdx.x == 0) __syncthreads();
  __syncthreads();
}
void shuffle_with_a_lane_that_left(Params p) {
  if (threadIdx.x % 32 == 31) return;
  p.out[threadIdx.x] = static_cast<int>(__shfl_xor_sync(0xffffffffu, threadIdx.x, 1));
}
void misaligned_vector(Params p) {
  reinterpret_cast<uint4 *>(p.out + 1)[0] = make_uint4(1, 2, 3, 4);
}

const struct {
  const char *name;
  void (*kernel)(Params);
} kKernels[] = {
    {"missing_barrier", missing_barrier},
    {"with_barrier", with_barrier},
    {"missing_cluster_barrier", missing_cluster_barrier},
    {"beyond_shared_memory", beyond_shared_memory},
    {"divergent_barrier", divergent_barrier},
    {"shuffle_with_a_lane_that_left", shuffle_with_a_lane_that_left},
    {"misaligned_vector", misaligned_vector},
};

}  // namespace

// Prints the output of the kernel in both orders of threads.
int main(int, char **argv) {
  alignas(16) static int out[128];
  for (const auto &entry : kKernels) {
    if (std::strcmp(entry.name, argv[1]) != 0) continue;
    for (int64_t reversed = 0; reversed < 2; ++reversed) {
      emulation_configure(16, reversed);
      cudaLaunchAttribute cluster = {cudaLaunchAttributeClusterDimension, {{2, 1, 1}}};
      cudaLaunchConfig_t config = {dim3(2), dim3(64), 64 * sizeof(int), nullptr, &cluster, 1};
      if (cudaLaunchKernelEx(&config, entry.kernel, Params{out}) != cudaSuccess) return 2;
      for (int i = 0; i < 64; ++i) std::printf("%d ", out[i]);
      std::printf("\n");
    }
    return 0;
  }
  return 3;
}
