// A ring of slots like that of ring.cuh, for rows that follow each other in memory in runs, as in a page: the GPU's
// copy engine brings a run by one instruction of one lane. It needs compute capability 9.0. For others the code is
// empty, and nobody launches it.
#pragma once

#include "ring.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define ENTMAXKV_BULK_COPIES
#endif

namespace entmaxkv::cuda {

/// The rows of a tile in shared memory, one after the other, and the barrier that counts the bytes that have arrived.
template <typename TheT, typename TheLayout>
struct BulkSlot {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kWords = Layout::kDims * static_cast<int>(sizeof(T)) / 16;  // words per row
  static constexpr int kLanePart = kWords / 4;  // words per row that one lane multiplies
  uint4 words[kTileRows * kWords];
  alignas(16) uint64_t barrier;

  /// Returns the nth word of a row that this lane multiplies.
  __device__ const uint4& word(int row, int nth) const {
    return words[row * kWords + 4 * nth + static_cast<int>(threadIdx.x % 4)];
  }
};

/// The rings of slots in a block's dynamic shared memory: one for each of its kWarps warps. Layout::kDims is head_dim.
template <typename TheT, typename TheLayout, int kMostWarps>
struct BulkRing {
  using T = TheT;
  using Layout = TheLayout;
  using Slot = BulkSlot<T, Layout>;
  static constexpr bool kWholeRuns = true;
  static constexpr int kRowBytes = Slot::kWords * 16;
  static constexpr int kWarps = std::min(kMostWarps, kRingBytes / (kTileRows * kRowBytes));
  static constexpr int kSlots = std::min(4, kRingBytes / (kTileRows * kRowBytes) / kWarps);
  static constexpr int kBytes = kWarps * kSlots * static_cast<int>(sizeof(Slot));

  /// Returns the nth slot of this warp.
  static __device__ Slot& slot(int nth) {
    return reinterpret_cast<Slot*>(dynamic_shared())[threadIdx.x / 32 * kSlots + nth];
  }

  // What a TileStream calls. All lanes call.

  /// Prepares the slots; no copy may be in flight.
  static __device__ void begin() {
#ifdef ENTMAXKV_BULK_COPIES
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int nth = 0; nth < kSlots; ++nth) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&slot(nth).barrier)) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
#endif
  }

  struct Row {
    const T* address;  // null: there is no such row, and it is taken as NaN
    int run;           // so many rows follow each other: a power of two, from a lane on that it divides
  };

  /// Starts to copy 32 rows into a slot. Lane i passes row i.
  static __device__ void load(int nth, const Row& row, int) {
    Slot& to = slot(nth);
    [[maybe_unused]] const int lane = threadIdx.x % 32;
    uint4* words = to.words + lane * Slot::kWords;
#ifdef EMULATE_CUDA
    if (row.address) memcpy(words, row.address, kRowBytes);
#endif
#ifdef ENTMAXKV_BULK_COPIES
    const uint32_t rows = __popc(__ballot_sync(kAllLanes, row.address != nullptr)), barrier = address(&to.barrier);
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(rows * kRowBytes)
                   : "memory");
    }
    if (row.address && lane % row.run == 0) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
          "%4;" ::"r"(address(words)),
          "l"(row.address), "r"(row.run * kRowBytes), "r"(barrier), "l"(read_once())
          : "memory");
    }
#endif
    if (!row.address) {
      for (int word = 0; word < Slot::kWords; ++word) words[word] = {~0u, ~0u, ~0u, ~0u};
#ifdef ENTMAXKV_BULK_COPIES
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // before the next copy into this slot
#endif
    }
  }

  static __device__ void end_load() {}

  /// Waits for the rows of the nth tile, which are in slot `at`.
  static __device__ void wait([[maybe_unused]] int n, [[maybe_unused]] int at) {
#ifdef ENTMAXKV_BULK_COPIES
    uint32_t done = 0;
    while (!done) {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(address(&slot(at).barrier)), "r"(n / kSlots % 2)
                   : "memory");
    }
#endif
    __syncwarp();  // the other lanes have written the rows that are not there
  }

 private:
#ifdef ENTMAXKV_BULK_COPIES
  static __device__ uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
#endif
};

}  // namespace entmaxkv::cuda
