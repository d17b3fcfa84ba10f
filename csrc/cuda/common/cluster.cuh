// Blocks that run at the same time and can read each other's shared memory: a thread block cluster, from compute
// capability 9.0 on. Elsewhere each block is a cluster of its own.
#pragma once

#include "launch.cuh"

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

/// Where a block of a cluster of several awaits what every block of it, itself too, sends it in a round. That takes
/// less time than sync(), which waits for all that the blocks have written. Lies in shared memory.
class Mailbox {
 public:
  /// One thread calls; sync() orders it, or arrive() and wait(), before the first round.
  __device__ void open() {
#ifdef ENTMAXKV_CLUSTERS
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier_)), "r"(size()));
    asm volatile("fence.mbarrier_init.release.cluster;");
#endif
  }

#ifdef ENTMAXKV_CLUSTERS
  /// Sets a shared variable of the block of that rank.
  __device__ void send(int rank, int& to, int value) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(at(rank, &to)),
                 "r"(value), "r"(at(rank, &barrier_))
                 : "memory");
  }

  __device__ void send(int rank, unsigned long long& to, unsigned long long value) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(at(rank, &to)),
                 "l"(value), "r"(at(rank, &barrier_))
                 : "memory");
  }

  __device__ void send(int rank, float4& to, const float4& value) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     at(rank, &to)),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(at(rank, &barrier_))
                 : "memory");
  }

  /// Raises one to the value, if it is lower.
  __device__ void raise(int rank, uint32_t& to, uint32_t value) {
    asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.max.u32 [%0], %1, [%2];" ::"r"(
                     at(rank, &to)),
                 "r"(value), "r"(at(rank, &barrier_))
                 : "memory");
  }

  /// Adds the value to one.
  __device__ void add(int rank, unsigned long long& to, unsigned long long value) {
    asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u64 [%0], %1, [%2];" ::"r"(
                     at(rank, &to)),
                 "l"(value), "r"(at(rank, &barrier_))
                 : "memory");
  }

  /// How many bytes this block sends that of that rank in this round. One thread of the block calls.
  __device__ void announce(int rank, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(at(rank, &barrier_)),
        "r"(bytes)
        : "memory");
  }

  /// Until everything has come. All threads call; rounds count from 0.
  __device__ void wait(int round) {
    uint32_t done = 0;
    while (!done) {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(address(&barrier_)), "r"(round % 2)
                   : "memory");
    }
  }

 private:
  static __device__ uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }

  static __device__ uint32_t at(int rank, const void* shared) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(shared)), "r"(rank));
    return there;
  }

#else
  template <typename T>
  __device__ void send(int, T& to, const T& value) {
    to = value;
  }
  __device__ void raise(int, uint32_t&, uint32_t) {}
  __device__ void add(int, unsigned long long&, unsigned long long) {}
  __device__ void announce(int, int) {}
  __device__ void wait(int) { __syncthreads(); }
#endif

 private:
  [[maybe_unused]] uint64_t barrier_;
};

}  // namespace entmaxkv::cuda::cluster
