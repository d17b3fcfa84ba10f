// append_kv on the CPU: one task per (row, KV head, page) copies the page's new tokens, computes their sketch, and
// computes the page's statistics from all its keys. The results depend on the keys in the page only, not on how many of
// them each append wrote.
#include <atomic>

#include "kernels.h"
#include "pages.h"
#include "parallel.h"
#include "sketches.h"

namespace entmaxkv::cpu {

namespace {

template <typename T>
void append(const AppendKv& op) {
  const int most_pages = (op.tokens - 1) / op.page_size + 2;  // a row's new tokens lie in no more pages than this
  parallel_for(int64_t{op.batch} * op.kv_heads * most_pages, [&](int64_t task) {
    const int nth = task % most_pages;
    const int kv_head = task / most_pages % op.kv_heads;
    const int64_t row = task / most_pages / op.kv_heads;
    const int first = op.seq_lens[row];
    const int end = first + (op.lengths ? op.lengths[row] : op.tokens);
    const int page = first / op.page_size + nth;
    const int start = std::max(first, page * op.page_size);
    const int stop = std::min(end, (page + 1) * op.page_size);
    if (start >= stop) return;
    const int64_t physical = op.page_table.row(row)[page];
    for (int token = start; token < stop; ++token) {
      const int slot = token % op.page_size;
      std::copy_n(op.k.at<T>(row, token - first, kv_head), op.head_dim, op.k_pages.at<T>(physical, kv_head, slot));
      std::copy_n(op.v.at<T>(row, token - first, kv_head), op.head_dim, op.v_pages.at<T>(physical, kv_head, slot));
      if (op.sketch) sketch_key<T>(op, op.k_pages, op.sketch, physical, kv_head, slot);
    }
    summarise_page<T>(op.k_pages, op.statistics, physical, kv_head, stop - page * op.page_size, op.head_dim);
  });
  for (int row = 0; row < op.batch; ++row) {  // stored with release: a thread that sees the new length sees the tokens
    const int tokens = op.lengths ? op.lengths[row] : op.tokens;
    std::atomic_ref(op.new_seq_lens[row]).store(op.seq_lens[row] + tokens, std::memory_order_release);
  }
}

}  // namespace

void append_kv(const AppendKv& op) {
  dispatch(op.dtype, [&](auto element) { append<decltype(element)>(op); });
}

}  // namespace entmaxkv::cpu
