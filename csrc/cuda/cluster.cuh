// Blocks that run at the same time and can read each other's shared memory: a thread block cluster, from compute
// capability 9.0 on. Elsewhere each block is a cluster of its own.
#pragma once

#include "device.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#define ENTMAXKV_CLUSTERS
#endif

namespace entmaxkv::cuda::cluster {

constexpr int kMostBlocks = 8;  // that every GPU with clusters can run together

/// How many blocks of a cluster the current device can run together.
inline int most_blocks() {
#ifdef EMULATE_CUDA
  return 1;
#else
  return is_hopper_or_later() ? kMostBlocks : 1;
#endif
}

#ifdef ENTMAXKV_CLUSTERS
__device__ inline int rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
__device__ inline int size() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }

/// wait() lasts until all threads of the cluster have called arrive(). A block must wait for the last read of its
/// memory.
__device__ inline void arrive() { cooperative_groups::this_cluster().barrier_arrive(); }
__device__ inline void wait() { cooperative_groups::this_cluster().barrier_wait(); }

/// A shared variable as the block of that rank has it. Far away: one thread should read it for all.
template <typename T>
__device__ T& of(int rank, T& shared) {
  return *cooperative_groups::this_cluster().map_shared_rank(&shared, rank);
}
#else
__device__ inline int rank() { return 0; }
__device__ inline int size() { return 1; }
__device__ inline void arrive() {}
__device__ inline void wait() { __syncthreads(); }

template <typename T>
__device__ T& of(int, T& shared) {
  return shared;
}
#endif

/// For all threads of the cluster what __syncthreads is for those of a block.
__device__ inline void sync() {
  arrive();
  wait();
}

}  // namespace entmaxkv::cuda::cluster
