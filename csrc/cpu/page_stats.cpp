// page_stats on the CPU: one task per (row, KV head, page in use) computes the minimum, maximum, mean and standard
// deviation of each coordinate over the page's keys.
#include "kernels.h"
#include "pages.h"

namespace entmaxkv::cpu {

template <typename T>
void summarise_page(const Rows& k_pages, const PageStatistics& statistics, int64_t page, int kv_head, int tokens,
                    int head_dim) {
  if (!statistics.k_min && !statistics.k_mean) return;
  const T* rows[kMaxPageSize];
  for (int slot = 0; slot < tokens; ++slot) rows[slot] = k_pages.at<T>(page, kv_head, slot);
  float summary[4][kMaxHeadDim];
  row_kernels<T>().summarise(rows, tokens, head_dim, summary[0], summary[1], summary[2], summary[3]);
  const Rows* targets[4] = {&statistics.k_min, &statistics.k_max, &statistics.k_mean, &statistics.k_std};
  for (int which = 0; which < 4; ++which) {
    if (!*targets[which]) continue;
    T* to = targets[which]->at<T>(page, kv_head);
    for (int d = 0; d < head_dim; ++d) to[d] = from_float<T>(summary[which][d]);
  }
}

template void summarise_page<float>(const Rows&, const PageStatistics&, int64_t, int, int, int);
template void summarise_page<Float16>(const Rows&, const PageStatistics&, int64_t, int, int, int);
template void summarise_page<BFloat16>(const Rows&, const PageStatistics&, int64_t, int, int, int);

void page_stats(const PageStats& op) {
  dispatch(op.dtype, [&](auto element) {
    for_each_page(op, [&](int64_t page, int kv_head, int tokens) {
      summarise_page<decltype(element)>(op.k_pages, op.statistics, page, kv_head, tokens, op.head_dim);
    });
  });
}

}  // namespace entmaxkv::cpu
