// The statistics of one dimension of one page, by one thread: for append_kv and page_stats.
#pragma once

#include "element.cuh"

namespace entmaxkv::cuda {

/// One dimension of the keys of a page. kRun keys are loaded at once. If the page has at most kRun tokens, its keys
/// stay in registers, so that a second visit does not read them again.
template <typename T>
class PageColumn {
 public:
  __device__ PageColumn(const T* keys, int64_t stride, int tokens) : keys_(keys), stride_(stride), tokens_(tokens) {}

  /// Calls body(key, odd) for each key in the order of the slots; odd is whether the slot's index is odd.
  template <typename Body>
  __device__ void visit(Body body) {
    for (int first = 0; first < tokens_; first += kRun) {
      if (first != first_) read(first);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (first + i < tokens_) body(to_float(run_[i]), i % 2 != 0);
      }
    }
  }

 private:
  static constexpr int kRun = 16;

  __device__ void read(int first) {
    const auto* key = reinterpret_cast<const char*>(keys_ + first * stride_);
    const int64_t bytes = stride_ * static_cast<int64_t>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kRun; ++i, key += bytes) {
      if (first + i < tokens_) run_[i] = *reinterpret_cast<const T*>(key);
    }
    first_ = first;
  }

  const T* keys_;
  int64_t stride_;
  int tokens_;
  int first_ = -1;
  T run_[kRun];
};

/// Writes dimension d of k_min and k_max, if there are these statistics, of a physical page with `tokens` > 0 keys. The
/// keys must be visible to this thread. Any thread may call.
template <typename T>
__device__ void summarise_bounds(const Rows& k_pages, const PageStatistics& statistics, int64_t page, int kv_head,
                                 int tokens, int d) {
  if (!statistics.k_min) return;
  PageColumn<T> column(k_pages.at<T>(page, kv_head) + d, k_pages.stride[2], tokens);
  float low = -kNothing, high = kNothing;
  column.visit([&](float key, bool) {
    low = key < low || key != key ? key : low;  // a NaN stays
    high = key > high || key != key ? key : high;
  });
  statistics.k_min.at<T>(page, kv_head)[d] = from_float<T>(low);
  statistics.k_max.at<T>(page, kv_head)[d] = from_float<T>(high);
}

/// Does the same for k_mean and k_std.
template <typename T>
__device__ void summarise_moments(const Rows& k_pages, const PageStatistics& statistics, int64_t page, int kv_head,
                                  int tokens, int d) {
  if (!statistics.k_mean) return;
  PageColumn<T> column(k_pages.at<T>(page, kv_head) + d, k_pages.stride[2], tokens);
  float sum = 0;
  column.visit([&](float key, bool) { sum += key; });
  // The mean distance from `centre`, added to it, corrects the rounding of the first sum.
  const float centre = sum / tokens;
  float drift = 0, squares = 0, odd_squares = 0;  // two short sums have less rounding than one long sum
  column.visit([&](float key, bool odd) {
    const float distance = key - centre;
    drift += distance;
    (odd ? odd_squares : squares) += distance * distance;
  });
  drift /= tokens;
  statistics.k_mean.at<T>(page, kv_head)[d] = from_float<T>(centre + drift);
  statistics.k_std.at<T>(page, kv_head)[d] =
      from_float<T>(sqrtf(fmaxf((squares + odd_squares) / tokens - drift * drift, 0)));
}

}  // namespace entmaxkv::cuda
