// How select_pages and select_gaussian write what they select.
#pragma once

#include "device.cuh"

namespace entmaxkv::cuda {

/// The selected pages of one (row, KV head), appended by a block of kThreads in ascending order.
template <int kThreads>
class PageList {
 public:
  __device__ PageList(const Selection& selection, int64_t list)
      : pages_(selection.row(list)), most_(selection.max_selected), length_(selection.counts + list) {}

  /// Appends the pages of those threads that want theirs. All threads call, with ascending pages.
  __device__ void append(int page, bool wanted) {
    int more;
    const int place = count_ + exclusive_scan<kThreads>(wanted, more);
    if (wanted) pages_[place] = page;
    count_ += more;
  }

  __device__ void finish() {
    for (int place = count_ + threadIdx.x; place < most_; place += kThreads) pages_[place] = -1;
    if (threadIdx.x == 0) *length_ = count_;
  }

 private:
  int32_t* pages_;
  int most_;
  int32_t* length_;
  int count_ = 0;
};

}  // namespace entmaxkv::cuda
