// Sums over a warp, a block and a cluster of blocks, each in one fixed order whatever the hardware does.
#pragma once

#include "device.cuh"

namespace dmdr {

struct Sum {
  template <class T>
  DMDR_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

template <class T>
DMDR_DEVICE T shuffle_xor(T value, int lanes) {
  static_assert(sizeof(T) % 4 == 0, "whole registers");
  constexpr int kWords = sizeof(T) / 4;
  uint32_t word[kWords];
  memcpy(word, &value, sizeof value);
#pragma unroll
  for (int i = 0; i < kWords; ++i) word[i] = __shfl_xor_sync(kAllLanes, word[i], lanes);
  memcpy(&value, word, sizeof value);
  return value;
}

// All lanes get the result. `op` commutes, so both lanes of a pair compute the same bits.
template <class T, class Op>
DMDR_DEVICE T warp_reduce(T value, Op op) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = op(value, shuffle_xor(value, lanes));
  return value;
}

constexpr int kMaxWarps = 32;

template <class T>
struct BlockSpace {
  T part[kMaxWarps];
};

// All threads get the result. `space` serves one call.
template <int kThreads, class T, class Op>
DMDR_DEVICE T block_reduce(BlockSpace<T> &space, T value, Op op) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert((kWarps & (kWarps - 1)) == 0, "a power of two");
  value = warp_reduce(value, op);
  if (threadIdx.x % kWarp == 0) space.part[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = space.part[threadIdx.x % kWarps];
#pragma unroll
  for (int lanes = kWarps / 2; lanes > 0; lanes /= 2) value = op(value, shuffle_xor(value, lanes));
  return value;
}

// The blocks that share a cluster; one block alone without the attribute, or before sm_90.
class Cluster {
 public:
  DMDR_DEVICE Cluster() {
#if DMDR_HAS_CLUSTERS
    size_ = __clusterSizeInBlocks();
    rank_ = __clusterRelativeBlockRank();
    if (size_ > 1) __cluster_barrier_arrive_relaxed();
#endif
  }
  DMDR_DEVICE uint32_t size() const { return size_; }
  DMDR_DEVICE uint32_t rank() const { return rank_; }
  DMDR_DEVICE void arrive() const {
#if DMDR_HAS_CLUSTERS
    if (size_ > 1) __cluster_barrier_arrive();
#endif
  }
  DMDR_DEVICE void wait() const {
#if DMDR_HAS_CLUSTERS
    if (size_ > 1) __cluster_barrier_wait();
#endif
  }
  // Where block `rank` has what lies at `local` in this block's shared memory.
  template <class T>
  DMDR_DEVICE T *remote(T *local, uint32_t rank) const {
#if DMDR_HAS_CLUSTERS
    return static_cast<T *>(__cluster_map_shared_rank(local, rank));
#else
    return local;
#endif
  }

 private:
  uint32_t size_ = 1, rank_ = 0;
};

constexpr int kMaxCluster = 16;

template <class T>
struct ClusterSpace {
  T slot[kMaxCluster];
};

// Every block pushes its value into every block's shared memory; all threads get the result. Once per kernel: its
// first wait is for the arrival in Cluster's constructor, which says that all blocks have started and can be written.
template <class T, class Op>
DMDR_DEVICE T cluster_reduce(const Cluster &cluster, ClusterSpace<T> &space, T value, Op op) {
  if (cluster.size() == 1) return value;
  cluster.wait();
  if (threadIdx.x < cluster.size()) *cluster.remote(&space.slot[cluster.rank()], threadIdx.x) = value;
  cluster.arrive();
  cluster.wait();
  T total = space.slot[0];
#pragma unroll 1
  for (uint32_t rank = 1; rank < cluster.size(); ++rank) total = op(total, space.slot[rank]);
  return total;
}

}  // namespace dmdr
