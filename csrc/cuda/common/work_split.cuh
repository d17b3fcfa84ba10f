// How the blocks of a grid divide lists of any length among themselves.
#pragma once

#include "reduce.cuh"
#include "sizes.cuh"

namespace entmaxkv::cuda {

/// This block's part of the items of several lists. The lists are taken as one sequence of items, and every block gets
/// a run of it; the lengths of runs differ by one at most.
struct WorkSplit {
  int list, item;  // the list of the first item, and that item's index in the list
  int of_list;     // items of this list from there on, of this block or not
  int items;

  /// Computes the part of this block of kBlock threads; count(list) is the number of a list's items. All threads call
  /// and all get the result.
  template <int kBlock, typename Count>
  __device__ static WorkSplit of_block(int lists, Count count) {
    return lists <= 32 ? of_few(lists, count) : of_many<kBlock>(lists, count);
  }

  /// Calls body(list, first, items) for each list in which this block has items. `count` is as in of_block.
  template <typename Count, typename Body>
  __device__ void visit(Count count, Body body) const {
    int left = items;
#pragma unroll 1
    for (int at = list, first = item, there = of_list;; there = count(++at), first = 0) {
      const int taken = min(there, left);
      left -= taken;
      if (taken > 0) body(at, first, taken);
      if (left == 0) break;
    }
  }

 private:
  /// The items of this block among those of all lists: begin ... end - 1.
  struct Run {
    int begin, end;

    __device__ explicit Run(unsigned total) {
      const unsigned blocks = gridDim.x, block = blockIdx.x, each = total / blocks, rest = total % blocks;
      begin = static_cast<int>(block * each + min(block, rest));
      end = begin + static_cast<int>(each + (block < rest));
    }
  };

  /// Lane i of each warp looks at list i. There is no barrier: this is how small kernels start.
  template <typename Count>
  __device__ static WorkSplit of_few(int lists, Count count) {
    const int lane = threadIdx.x % 32;
    const int own = lane < lists ? count(lane) : 0, upto = sum_upto(own);
    const Run run(__shfl_sync(kAllLanes, upto, 31));
    const uint32_t beyond = __ballot_sync(kAllLanes, run.begin < upto);
    if (run.begin == run.end) return {0, 0, 0, 0};
    const int list = __ffs(beyond) - 1, end = __shfl_sync(kAllLanes, upto, list);
    const int before = end - __shfl_sync(kAllLanes, own, list);
    return {list, run.begin - before, end - run.begin, run.end - run.begin};
  }

  /// Each thread looks at some lists.
  template <int kBlock, typename Count>
  __device__ static WorkSplit of_many(int lists, Count count) {
    __shared__ WorkSplit s_split;
    const int each = ceil_div(lists, kBlock);
    const int first = min(static_cast<int>(threadIdx.x) * each, lists), end = min(first + each, lists);
    int own = 0;
#pragma unroll 1
    for (int list = first; list < end; ++list) own += count(list);
    int total;
    int before = exclusive_scan<kBlock>(own, total);
    const Run run(total);
    if (run.begin == run.end) return {0, 0, 0, 0};
    if (before <= run.begin && run.begin < before + own) {
      int list = first, items = count(list);
#pragma unroll 1
      for (; before + items <= run.begin; items = count(list)) {
        before += items;
        ++list;
      }
      s_split = {list, run.begin - before, before + items - run.begin, run.end - run.begin};
    }
    __syncthreads();
    return s_split;
  }
};

}  // namespace entmaxkv::cuda
