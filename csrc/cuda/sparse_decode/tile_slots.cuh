// Slots for a tile of keys or of values in shared memory, and the copies into them (value_sums.cuh multiplies tiles).
#pragma once

#include "bulk_copy.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

/// The rows that a warp copies next: of keys or values, one row for each lane.
struct TileRows {
  const TokenList& list;
  const Rows& rows;
  int kv_head, head_dim;
  int physical, in_page;  // physical page of this lane's token, and its slot there
  bool whole;             // the tile has 32 tokens; else, lanes behind the last token repeat it

  template <typename T>
  __device__ const T* own() const {
    return list.row<T>(rows, kv_head, physical, in_page);
  }
};

/// A tile that all lanes copy, 16 bytes at a time, or one element at a time if rows are not aligned.
template <typename T, typename Layout>
struct WordSlot : Slot<T, Layout> {
  // The methods of a slot. All lanes call.

  /// Prepares the slot.
  __device__ void open() {}

  /// Starts to copy a tile.
  __device__ void load(const TileRows& tile) {
    constexpr int kAtOnce = Layout::kVectors && Layout::kDims * sizeof(T) <= 512 ? 8 : 1;
    Slot<T, Layout>::template load<kAtOnce>(tile.own<T>(), tile.head_dim);
  }

  /// Ends a load, or takes the place of one: each warp calls it for one slot after the other.
  static __device__ void end_load() { commit_copies(); }

  /// Waits for the slot, which is loaded for the nth time and is the next of kSlots.
  template <int kSlots>
  __device__ void wait(int) const {
    wait_for_copies<kSlots - 1>();
  }
};

/// A tile that the copy engine brings: four rows at a time if all are there, else each row by itself. Layout::kDims is
/// head_dim, the rows of a page follow each other in memory, and a list holds whole pages.
template <typename TheT, typename TheLayout>
struct RunSlot {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kWords = Layout::kDims * static_cast<int>(sizeof(T)) / 16;
  static constexpr int kLanePart = kWords / 4;
  static constexpr int kRun = 4;                       // rows of a copy
  static constexpr int kRunWords = kRun * kWords + 1;  // with the one more, rows 4 apart lie in different banks
  uint4 words[kTileRows / kRun * kRunWords];
  CopyBarrier barrier;

  static __device__ int index(int row, int word) { return spread(row / kRun) * kRunWords + row % kRun * kWords + word; }

  __device__ const uint4& word(int row, int nth) const {
    return words[index(row, 4 * nth + static_cast<int>(threadIdx.x % 4))];
  }

  __device__ void open() {
    if (threadIdx.x % 32 == 0) {
      barrier.open();
      CopyBarrier::fence();
    }
    __syncwarp();
  }

  __device__ void load(const TileRows& tile) {
    const bool there = tile.list.has_page(tile.physical);
    const T* row = there ? tile.rows.at<T>(tile.physical, tile.kv_head, tile.in_page) : nullptr;
    copy_rows<kWords>(barrier, words + index(threadIdx.x % 32, 0), row, tile.whole ? kRun : 1);
  }

  static __device__ void end_load() {}

  template <int kSlots>
  __device__ void wait(int nth) const {
    barrier.wait(nth);
  }
};

}  // namespace entmaxkv::cuda
