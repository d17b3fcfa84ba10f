// How select_pages and select_gaussian write what they select.
#pragma once

#include "device.cuh"

namespace entmaxkv::cuda {

/// Writes those of the pages begin ... end - 1 for which wanted(page) holds, ascending; returns how many. A block of
/// kThreads; all threads call.
template <int kThreads, typename Wanted>
__device__ int collect_pages(int32_t* to, int begin, int end, Wanted wanted) {
  constexpr int kRun = 4;  // pages, kThreads apart, that a thread looks at together
  int count = 0;
  for (int first = begin; first < end; first += kThreads * kRun) {
    bool wants[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int page = first + i * kThreads + static_cast<int>(threadIdx.x);
      wants[i] = page < end && wanted(page);
    }
    const Places<kThreads, kRun> places(wants);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (wants[i]) to[count + places.place[i]] = first + i * kThreads + static_cast<int>(threadIdx.x);
    }
    count += places.count;
  }
  return count;
}

}  // namespace entmaxkv::cuda
