// How the blocks of a fixed grid divide lists of any length.
#pragma once

#include "device.cuh"

namespace entmaxkv::cuda {

/// This block's even share of the items of several lists, a run of successive ones.
struct Share {
  int list, item;  // the first
  int items;

  /// All threads call.
  template <int kBlock, typename Count>
  __device__ static Share of_block(int lists, Count count) {
    __shared__ Share s_share;
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
      s_share = {list, begin - before, stop - begin};
    }
    __syncthreads();
    return s_share;
  }
};

}  // namespace entmaxkv::cuda
