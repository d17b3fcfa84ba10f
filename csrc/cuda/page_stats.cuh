// Statistics of one page, shared by append_kv and page_stats.
#pragma once

#include "device.cuh"

namespace entmaxkv::cuda {

/// Renews dimension d of the statistics of a physical page that holds `tokens` > 0 keys. One thread per dimension; the
/// page's keys must be visible to it.
template <typename T>
__device__ void summarise_page(const Rows& k_pages, const PageStatistics& statistics, int64_t page, int kv_head,
                               int tokens, int d) {
  if (!statistics.k_min && !statistics.k_mean) return;
  float low = -kNothing, high = kNothing, sum = 0;
  for (int slot = 0; slot < tokens; ++slot) {
    const float key = to_float(k_pages.at<T>(page, kv_head, slot)[d]);
    low = fminf(low, key);
    high = fmaxf(high, key);
    sum += key;
  }
  if (statistics.k_min) {
    statistics.k_min.at<T>(page, kv_head)[d] = from_float<T>(low);
    statistics.k_max.at<T>(page, kv_head)[d] = from_float<T>(high);
  }
  if (statistics.k_mean) {
    // Corrected by the mean distance from it: what the first sum has lost to rounding comes back.
    const float centre = sum / tokens;
    float drift = 0, squares = 0, odd_squares = 0;  // two short sums round less than one long one
    for (int slot = 0; slot < tokens; ++slot) {
      const float distance = to_float(k_pages.at<T>(page, kv_head, slot)[d]) - centre;
      drift += distance;
      (slot % 2 ? odd_squares : squares) += distance * distance;
    }
    drift /= tokens;
    statistics.k_mean.at<T>(page, kv_head)[d] = from_float<T>(centre + drift);
    statistics.k_std.at<T>(page, kv_head)[d] =
        from_float<T>(sqrtf(fmaxf((squares + odd_squares) / tokens - drift * drift, 0)));
  }
}

}  // namespace entmaxkv::cuda
