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

}  // namespace entmaxkv::cuda
