// How select_pages and select_gaussian write what they select.
#pragma once

#include "device.cuh"

namespace entmaxkv::cuda {

/// Writes the pages 0 ... used - 1 for which wanted(page) holds as the selection of one (row, KV head): ascending, then
/// -1, and their count. A block of kThreads; all threads call.
template <int kThreads, typename Wanted>
__device__ void collect_pages(const Selection& selection, int64_t list, int used, Wanted wanted) {
  constexpr int kRun = 4;  // successive pages of a thread
  int32_t* pages = selection.row(list);
  int count = 0;
  for (int first = 0; first < used; first += kThreads * kRun) {
    const int page = first + static_cast<int>(threadIdx.x) * kRun;
    bool wants[kRun];
    int own = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      wants[i] = page + i < used && wanted(page + i);
      own += wants[i];
    }
    int more;
    int to = count + exclusive_scan<kThreads>(own, more);
    count += more;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (wants[i]) pages[to++] = page + i;
    }
  }
  for (int to = count + threadIdx.x; to < selection.max_selected; to += kThreads) pages[to] = -1;
  if (threadIdx.x == 0) selection.counts[list] = count;
}

}  // namespace entmaxkv::cuda
