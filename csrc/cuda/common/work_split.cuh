// How the blocks of a fixed grid divide lists of any length among themselves.
#pragma once

#include "reduce.cuh"
#include "sizes.cuh"

namespace entmaxkv::cuda {

/// This block's part of the items of several lists. The lists are taken as one sequence of items, and every block gets
/// an equally long run of it.
struct WorkSplit {
  int list, item;  // the list of the first item, and that item's index in the list
  int items;

  /// Computes the part of this block of kBlock threads; count(list) is the number of a list's items. All threads call
  /// and all get the result.
  template <int kBlock, typename Count>
  __device__ static WorkSplit of_block(int lists, Count count) {
    __shared__ WorkSplit s_split;
    const int each = ceil_div(lists, kBlock);
    const int first = min(static_cast<int>(threadIdx.x) * each, lists), end = min(first + each, lists);
    int own = 0;
#pragma unroll 1
    for (int list = first; list < end; ++list) own += count(list);
    int total;
    int before = exclusive_scan<kBlock>(own, total);
    const auto begin = static_cast<int>(int64_t{total} * blockIdx.x / gridDim.x);
    const auto stop = static_cast<int>(int64_t{total} * (blockIdx.x + 1) / gridDim.x);
    if (begin == stop) return {0, 0, 0};
    if (before <= begin && begin < before + own) {
      int list = first;
#pragma unroll 1
      for (int items = count(list); before + items <= begin; items = count(list)) {
        before += items;
        ++list;
      }
      s_split = {list, begin - before, stop - begin};
    }
    __syncthreads();
    return s_split;
  }

  /// Calls body(list, first, items) for each list in which this block has items. `count` is as in of_block.
  template <typename Count, typename Body>
  __device__ void visit(Count count, Body body) const {
    int first = item, left = items;
#pragma unroll 1
    for (int at = list; left > 0; ++at, first = 0) {
      const int taken = min(count(at) - first, left);
      if (taken <= 0) continue;
      body(at, first, taken);
      left -= taken;
    }
  }
};

/// Returns a list that a block of kBlock threads should help with once its own lists have no tiles left, or -1.
/// tiles_of(list) is the number of a list's tiles and taken_of(list) how many of them warps have taken. A list is
/// eligible if it has at least kWorthIt tiles left or no block has begun it. Blocks weigh lists differently, so they
/// choose different ones. All threads call and all get the result.
template <int kBlock, typename Tiles, typename Taken>
__device__ int list_with_work_left(int lists, Tiles tiles_of, Taken taken_of) {
  constexpr int kWorthIt = 16;  // least number of tiles for which help pays
  __shared__ unsigned long long s_most;
  __syncthreads();  // all threads have read the result of an earlier call
  if (threadIdx.x == 0) s_most = 0;
  __syncthreads();
  unsigned long long most = 0;
  for (int list = threadIdx.x; list < lists; list += kBlock) {
    const int taken = taken_of(list), left = tiles_of(list) - taken;
    if (left < (taken > 0 ? kWorthIt : 1)) continue;
    const unsigned long long weight = 8 + (list * 5 + blockIdx.x * 3) % 8;
    most = max(most, left * weight << 32 | static_cast<unsigned>(list));
  }
  if (most > 0) atomicMax(&s_most, most);
  __syncthreads();
  return s_most > 0 ? static_cast<int>(s_most & 0xffffffffu) : -1;
}

/// A work queue of a list's tiles, shared by the warps of all blocks. A warp takes runs of successive tiles from the
/// counter `taken` in global memory, and asks for the next run while it works on the last.
class TileQueue {
 public:
  static constexpr int kHeld = 8;     // the latest tiles of a warp that tile() knows
  static constexpr int kMostRun = 4;  // most tiles of a run

  /// s_held [kHeld]: shared memory of this warp. All lanes call.
  __device__ TileQueue(uint32_t* taken, int tiles, int* s_held)
      : taken_(taken), tiles_(tiles), run_(max(1, min(tiles / 2048, kMostRun))), s_held_(s_held) {
    ask();
  }

  /// Returns whether the warp has an nth tile. All lanes call. n is at most one above the largest n so far, and one of
  /// the last kHeld.
  __device__ bool more(int n) {
    if (n == known_) {
      if (left_ == 0) {
        next_ = __shfl_sync(kAllLanes, asked_, 0);
        left_ = run_;
        if (next_ < tiles_) ask();
      }
      if (threadIdx.x % 32 == 0) s_held_[n % kHeld] = next_;
      __syncwarp();
      ++known_, ++next_, --left_;
    }
    return tile(n) < tiles_;
  }

  /// Returns the index in the list of the warp's nth tile.
  __device__ int tile(int n) const { return s_held_[n % kHeld]; }

 private:
  __device__ void ask() {
    if (threadIdx.x % 32 == 0) asked_ = static_cast<int>(atomicAdd(taken_, static_cast<uint32_t>(run_)));
  }

  uint32_t* taken_;
  int tiles_, run_;
  int* s_held_;
  int known_ = 0, asked_ = 0, next_ = 0, left_ = 0;
};

}  // namespace entmaxkv::cuda
