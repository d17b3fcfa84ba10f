// Shared memory for a tile of keys or values that a warp multiplies on tensor cores, and the copies into it.
//   Rows that are 4 apart are multiplied together, eight rows at a time. Where words of 16 bytes lie puts these, and
// the words of neighbouring such rows, into different banks.
#pragma once

#include "../common/bulk_copy.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

/// Returns an order of 0 ... 7 in which 0 and 1, 2 and 3, ... are 4 apart.
__device__ inline int spread(int n) { return n / 2 + n % 2 * 4; }

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
template <typename TheT, typename TheLayout>
struct WordSlot {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kWords = Layout::kDims * static_cast<int>(sizeof(T)) / 16;  // words per row
  static constexpr int kLanePart = kWords / 4;  // words per row that one lane multiplies
  uint4 words[kTileRows * kWords];

  /// Returns the index in `words` of a row's word.
  static __device__ int index(int row, int word) { return row * kWords + (word ^ spread(row / 4)); }

  /// Returns the nth word of a row that this lane multiplies.
  __device__ const uint4& word(int row, int nth) const {
    return words[index(row, 4 * nth + static_cast<int>(threadIdx.x % 4))];
  }

  // The methods of a slot. All lanes call.
  __device__ void open() {}

  /// Starts to copy a tile.
  __device__ void load(const TileRows& tile) {
    constexpr int kCount = 16 / sizeof(T);
    const auto address = reinterpret_cast<unsigned long long>(tile.own<T>());
    const int lane = threadIdx.x % 32;
#pragma unroll(Layout::kVectors&& kWords <= 32 ? 8 : 1)
    for (int i = 0; i < kWords; ++i) {
      const int at = i * 32 + lane, row = at / kWords, d = at % kWords * kCount;
      const T* from = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, row));
      uint4& to = words[index(row, at % kWords)];
      if constexpr (Layout::kVectors) {
        stream_async(to, from + d, d < tile.head_dim);
      } else {
        to = load_word<false>(from, d, tile.head_dim);
      }
    }
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
  static constexpr int kRun = 4;  // rows of a copy
  static constexpr int kRunWords = kRun * kWords + 1;
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
    constexpr uint32_t kRowBytes = kWords * 16;
    const int lane = threadIdx.x % 32;
    const bool there = static_cast<unsigned>(tile.physical) < static_cast<unsigned>(tile.list.pages);
    const uint32_t rows = __popc(__ballot_sync(kAllLanes, there));
    if (lane == 0) barrier.announce(rows * kRowBytes);
    const int run = tile.whole && rows == kTileRows ? kRun : 1;
    uint4* own = words + index(lane, 0);
    if (there && lane % run == 0) {
      barrier.copy(own, tile.rows.at<T>(tile.physical, tile.kv_head, tile.in_page), run * kRowBytes);
    }
    if (!there) {
      for (int word = 0; word < kWords; ++word) own[word] = {~0u, ~0u, ~0u, ~0u};  // NaN
      fence_before_copies();
    }
  }

  static __device__ void end_load() {}

  template <int kSlots>
  __device__ void wait(int nth) const {
    barrier.wait(nth);
  }
};

}  // namespace entmaxkv::cuda
