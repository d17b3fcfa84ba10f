// Thread block clusters: blocks that run at the same time and can read each other's shared memory. They exist from
// compute capability 9.0 on. On other GPUs each block is a cluster of one block.
#pragma once

#include "copy.cuh"
#include "launch.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#define ENTMAXKV_CLUSTERS
#endif

namespace entmaxkv::cuda::cluster {

constexpr int kMostBlocks = 8;  // the largest cluster that every GPU with clusters supports

/// Returns the largest number of blocks that a cluster may have on the current device.
inline int most_blocks() { return is_hopper_or_later() ? kMostBlocks : 1; }

/// Returns how large the clusters of a kernel may be, at most kMostBlocks, if `clusters` of them are to run at the same
/// time on the current device; 1 if no size allows that. `grid` is that of the launch, whose cluster does not matter.
/// Clusters use fewer multiprocessors than there are, because each lies within one part of the GPU.
template <typename... Params>
int largest_at_once(const char* op, void (*kernel)(Params...), Grid grid, int64_t clusters) {
  struct Question {
    int device;
    const void* kernel;
    int64_t clusters;
    bool packed;
    bool operator==(const Question&) const = default;
  };
  const Question question{current_device(), reinterpret_cast<const void*>(kernel), clusters, grid.packed};
  thread_local Question last{-1, nullptr, 0, false};  // the next step mostly asks the same
  thread_local int answer = 0;
  if (question == last) return answer;
  int blocks = most_blocks();
  for (; blocks > 1; --blocks) {
    grid.cluster = blocks;
    grid.blocks.x = blocks;
    int at_once = 0;
    const Launch tried(op, kernel, grid, nullptr);
    const bool is_possible = cudaOccupancyMaxActiveClusters(&at_once, kernel, &tried.config) == cudaSuccess;
    if (is_possible && at_once >= clusters) break;
    if (!is_possible) cudaGetLastError();  // forget the error
  }
  last = question;
  return answer = blocks;
}

#ifdef EMULATE_CUDA
using namespace emulation::cluster;  // tests/emulation
#else
#ifdef ENTMAXKV_CLUSTERS
__device__ inline int rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
__device__ inline int size() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }

/// wait() returns when all threads of the cluster have called arrive(). All threads call both. A block must not end
/// while another block may still read its shared memory.
__device__ inline void arrive() { cooperative_groups::this_cluster().barrier_arrive(); }
__device__ inline void wait() { cooperative_groups::this_cluster().barrier_wait(); }

/// Does what arrive() does, but tells the others only of mailboxes that this thread has opened.
__device__ inline void arrive_with_mailboxes() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

/// Returns the copy of a shared variable that block `rank` has. A read is slow: let one thread read for all.
template <typename T>
__device__ T& of(int rank, T& shared) {
  return *cooperative_groups::this_cluster().map_shared_rank(&shared, rank);
}
#else
__device__ inline int rank() { return 0; }
__device__ inline int size() { return 1; }
__device__ inline void arrive() {}
__device__ inline void arrive_with_mailboxes() {}
__device__ inline void wait() { __syncthreads(); }

template <typename T>
__device__ T& of(int, T& shared) {
  return shared;
}
#endif

/// An mbarrier that counts the bytes which the blocks of a cluster send to this block. In each round every block,
/// including this one, sends values and announces how many bytes they are; wait() returns when all have arrived. This
/// is faster than sync(), which waits for every write of the blocks. Only for clusters of several blocks. The object
/// lies in shared memory. A block must not begin a round before every block has ended the one before, which that
/// block's own wait() does not tell: take turns between two mailboxes.
class Mailbox {
 public:
  /// Initialises the barrier. One thread calls. sync(), or wait() after arrive() or arrive_with_mailboxes(), must
  /// follow before the first round.
  __device__ void open() {
#ifdef ENTMAXKV_CLUSTERS
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier_)), "r"(size()));
    asm volatile("fence.mbarrier_init.release.cluster;");
#endif
  }

#ifdef ENTMAXKV_CLUSTERS
  /// Sets the copy of `to` that block `rank` has to `value`. `to` is a shared variable.
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

  /// Replaces the copy of `to` that block `rank` has by the maximum of itself and `value`.
  __device__ void raise(int rank, uint32_t& to, uint32_t value) {
    asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.max.u32 [%0], %1, [%2];" ::"r"(
                     at(rank, &to)),
                 "r"(value), "r"(at(rank, &barrier_))
                 : "memory");
  }

  /// Adds `value` to the copy of `to` that block `rank` has.
  __device__ void add(int rank, unsigned long long& to, unsigned long long value) {
    asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u64 [%0], %1, [%2];" ::"r"(
                     at(rank, &to)),
                 "l"(value), "r"(at(rank, &barrier_))
                 : "memory");
  }

  /// Announces how many bytes this block sends to block `rank` in this round. One thread of the block calls.
  __device__ void announce(int rank, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(at(rank, &barrier_)),
        "r"(bytes)
        : "memory");
  }

  /// Waits until all bytes of the round have arrived. All threads call. Rounds count from 0.
  __device__ void wait(int round) { wait_for_parity(barrier_, round % 2); }

 private:
  static __device__ uint32_t at(int rank, const void* shared) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(shared)), "r"(rank));
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
#endif

/// Does for the cluster what __syncthreads does for a block. All threads of the cluster call.
__device__ inline void sync() {
  arrive();
  wait();
}

}  // namespace entmaxkv::cuda::cluster
