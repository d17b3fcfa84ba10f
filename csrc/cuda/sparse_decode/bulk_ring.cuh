// A ring of slots like that of ring.cuh, for rows that follow each other in memory in runs, as in a page: the GPU's
// copy engine brings a run by one instruction of one lane.
#pragma once

#include "bulk_copy.cuh"

namespace entmaxkv::cuda {

/// The rows of a tile in shared memory, one after the other, and the barrier that counts the bytes that have arrived.
template <typename TheT, typename TheLayout>
struct BulkSlot {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kWords = Layout::kDims * static_cast<int>(sizeof(T)) / 16;  // words per row
  static constexpr int kLanePart = kWords / 4;  // words per row that one lane multiplies
  uint4 words[kTileRows * kWords];
  CopyBarrier barrier;

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

  // What a TileStream calls.
  static __device__ void begin() {
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int nth = 0; nth < kSlots; ++nth) slot(nth).barrier.open();
      CopyBarrier::fence();
    }
    __syncwarp();
  }

  struct Row {
    const T* address;  // null: there is no such row, and it is taken as NaN
    int run;           // rows at multiples of `run` begin copies of `run` consecutive rows; a power of two
  };

  /// Lane i passes row i.
  static __device__ void load(int nth, const Row& row, int, uint64_t policy) {
    Slot& to = slot(nth);
    copy_rows<Slot::kWords>(to.barrier, to.words + threadIdx.x % 32 * Slot::kWords, row.address, row.run, policy);
  }

  static __device__ void end_load() {}

  static __device__ void wait(int tile, int nth) {
    slot(nth).barrier.wait(tile / kSlots);
    __syncwarp();  // the other lanes have written the rows that are not there
  }

  static __device__ void end() {
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int nth = 0; nth < kSlots; ++nth) slot(nth).barrier.close();
  }
};

}  // namespace entmaxkv::cuda
