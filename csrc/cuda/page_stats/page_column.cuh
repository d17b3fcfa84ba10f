// Statistics of one page, shared by append_kv and page_stats: one thread per dimension and pair of statistics.
#pragma once

#include "../common/element.cuh"

namespace entmaxkv::cuda {

/// One dimension of the keys of a page. Up to kRun of them are on their way together, and a page of no more is read
/// once.
template <typename T>
class PageColumn {
 public:
  __device__ PageColumn(const T* keys, int64_t stride, int tokens) : keys_(keys), stride_(stride), tokens_(tokens) {}

  /// Calls body(key, odd) for each key in the order of the slots.
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

/// Renews dimension d of k_min and k_max of a physical page that holds `tokens` > 0 keys, visible to this thread.
template <typename T>
__device__ void summarise_bounds(const Rows& k_pages, const PageStatistics& statistics, int64_t page, int kv_head,
                                 int tokens, int d) {
  if (!statistics.k_min) return;
  PageColumn<T> column(k_pages.at<T>(page, kv_head) + d, k_pages.stride[2], tokens);
  float low = -kNothing, high = kNothing;
  column.visit([&](float key, bool) {
    low = key < low || key != key ? key : low;  // NaN stays
    high = key > high || key != key ? key : high;
  });
  statistics.k_min.at<T>(page, kv_head)[d] = from_float<T>(low);
  statistics.k_max.at<T>(page, kv_head)[d] = from_float<T>(high);
}

/// The same for k_mean and k_std.
template <typename T>
__device__ void summarise_moments(const Rows& k_pages, const PageStatistics& statistics, int64_t page, int kv_head,
                                  int tokens, int d) {
  if (!statistics.k_mean) return;
  PageColumn<T> column(k_pages.at<T>(page, kv_head) + d, k_pages.stride[2], tokens);
  float sum = 0;
  column.visit([&](float key, bool) { sum += key; });
  // Corrected by the mean distance from it: what the first sum has lost to rounding comes back.
  const float centre = sum / tokens;
  float drift = 0, squares = 0, odd_squares = 0;  // two short sums round less than one long one
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
