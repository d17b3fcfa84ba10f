// page_stats on the CPU: one task per (row, KV head, page in use).
#include "kernels.h"
#include "pages.h"
#include "parallel.h"

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
  parallel_for(int64_t{op.batch} * op.kv_heads * op.max_pages, [&](int64_t task) {
    const int page = task % op.max_pages;
    const int kv_head = task / op.max_pages % op.kv_heads;
    const int64_t row = task / op.max_pages / op.kv_heads;
    const int tokens = tokens_in_page(page, op.seq_lens[row], op.page_size);
    if (tokens <= 0) return;
    dispatch(op.dtype, [&](auto element) {
      summarise_page<decltype(element)>(op.k_pages, op.statistics, op.page_table.row(row)[page], kv_head, tokens,
                                        op.head_dim);
    });
  });
}

}  // namespace entmaxkv::cpu
