// Copies from global to shared memory by the GPU's copy engine: one lane's instruction copies any multiple of 16 bytes.
// They need compute capability 9.0. For others the code is empty, and nobody launches it.
#pragma once

#include "../common/ring.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define ENTMAXKV_BULK_COPIES
#endif

namespace entmaxkv::cuda {

#ifdef EMULATE_CUDA
using CopyBarrier = emulation::CopyBarrier;  // tests/emulation
#else
/// A barrier in shared memory that counts the bytes which have arrived. Its phases follow each other: in each, the
/// bytes are announced and copied, and then somebody waits for them. A wait for other bytes than were announced never
/// ends.
class alignas(16) CopyBarrier {
 public:
  /// Prepares the barrier. One lane calls, and then fence.
  __device__ void open() {
#ifdef ENTMAXKV_BULK_COPIES
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&word_)) : "memory");
#endif
  }

  /// Makes the barriers that this lane has opened known to the copy engine.
  static __device__ void fence() {
#ifdef ENTMAXKV_BULK_COPIES
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  /// Announces all bytes of a phase. One lane calls.
  __device__ void announce([[maybe_unused]] uint32_t bytes) {
#ifdef ENTMAXKV_BULK_COPIES
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word_)), "r"(bytes)
                 : "memory");
#endif
  }

  /// Starts to copy bytes that are read once; `policy` is that of read_once. Both addresses and the number of bytes are
  /// multiples of 16.
  __device__ void copy(uint4* s_to, const void* from, uint32_t bytes, uint64_t policy) {
#ifdef ENTMAXKV_BULK_COPIES
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(s_to)),
        "l"(from), "r"(bytes), "r"(shared_address(&word_)), "l"(policy)
        : "memory");
#endif
  }

  /// Waits until the bytes of the nth phase have arrived. All lanes of a warp call, before the next phase ends.
  __device__ void wait([[maybe_unused]] int nth) const {
#ifdef ENTMAXKV_BULK_COPIES
    wait_for_parity(word_, nth % 2);
#endif
  }

  /// Ends the use of the barrier, after the last wait. One lane calls. The memory may then hold another.
  __device__ void close() {
#ifdef ENTMAXKV_BULK_COPIES
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(&word_)) : "memory");
#endif
  }

 private:
  uint64_t word_;
};
#endif

/// Orders this lane's writes to shared memory before later copies to the same place.
__device__ inline void fence_before_copies() {
#ifdef ENTMAXKV_BULK_COPIES
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Starts to copy the kTileRows rows of a tile, of kWords words each. Lane i passes the address of row i, or null if
/// there is no such row, and where in shared memory it goes; the row becomes NaN if it is not there. Lanes that are
/// multiples of `run`, a power of two, copy that many rows, unless some row of the tile is not there. All lanes call.
template <int kWords>
__device__ void copy_rows(CopyBarrier& s_barrier, uint4* s_own, const void* row, int run, uint64_t policy) {
  constexpr uint32_t kRowBytes = kWords * 16;
  const int lane = threadIdx.x % 32;
  const uint32_t rows = __popc(__ballot_sync(kAllLanes, row != nullptr));
  if (lane == 0) s_barrier.announce(rows * kRowBytes);
  if (rows < kTileRows) run = 1;
  if (row && (lane & (run - 1)) == 0) s_barrier.copy(s_own, row, run * kRowBytes, policy);
  if (!row) {
    for (int word = 0; word < kWords; ++word) s_own[word] = {~0u, ~0u, ~0u, ~0u};
    fence_before_copies();
  }
}

/// Returns whether the rows of a page follow each other in memory without gaps, on a GPU that can copy them together.
/// kDims: dimensions for which a slot has room.
template <int kDims>
bool in_runs(const Rows& rows, int head_dim) {
  return is_hopper_or_later() && head_dim == kDims && rows.stride[2] == head_dim;
}

}  // namespace entmaxkv::cuda
