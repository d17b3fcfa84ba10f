// select_pages on the CPU: one task per (row, KV head).
//   1. A page's merit is the largest over the group's heads of score - best - excess (page_softmax.h): the largest log
//      page softmax, plus a number that is the same for all pages of the row.
//   2. The last page is selected. Other pages are selected in the order of falling merit, while their tokens fit the
//      budget. If merits are equal, the lower page comes first.
//   3. Selected pages are written in ascending order.
#include <vector>

#include "../page_softmax.h"
#include "kernels.h"
#include "pages.h"
#include "scores.h"

namespace entmaxkv::cpu {

void select_pages(const SelectPages& op) {
  parallel_for(int64_t{op.batch} * op.kv_heads, [&](int64_t task) {
    const int64_t row = task / op.kv_heads;
    const int seq_len = op.seq_lens[row];
    const int used = pages_in_use(seq_len, op.page_size);
    if (used == 0) return end_list(op.selection, task, 0);

    std::vector<float> best(op.group, kNothing), merit(used, kNothing);
    std::vector<int32_t> logarithm(op.group);
    const auto scores = [&](int h) { return op.scores + (task * op.group + h) * op.max_pages; };
    for (int h = 0; h < op.group; ++h) {
      for (int page = 0; page < used; ++page) best[h] = scores(h)[page] > best[h] ? scores(h)[page] : best[h];
      uint64_t sum = 0;
      for (int page = 0; page < used; ++page) {
        sum += page_softmax::weight(page_softmax::distance(scores(h)[page], best[h]));
      }
      logarithm[h] = page_softmax::logarithm(sum);
    }
    const int32_t least = *std::min_element(logarithm.begin(), logarithm.end());
    for (int h = 0; h < op.group; ++h) {
      const float excess = page_softmax::excess(logarithm[h], least);
      for (int page = 0; page < used; ++page) {
        const float log_softmax = page_softmax::distance(scores(h)[page], best[h]) - excess;
        merit[page] = log_softmax > merit[page] ? log_softmax : merit[page];  // false for NaN, which has no say
      }
    }

    const int last = used - 1;
    const int64_t left = op.budget - tokens_in_page(last, seq_len, op.page_size);
    const auto others = static_cast<int>(std::clamp<int64_t>(left / op.page_size, 0, last));
    std::vector<int32_t> pages(last);
    for (int page = 0; page < last; ++page) pages[page] = page;
    if (others < last) {
      std::nth_element(pages.begin(), pages.begin() + others, pages.end(),
                       [&](int32_t a, int32_t b) { return merit[a] != merit[b] ? merit[a] > merit[b] : a < b; });
      std::sort(pages.begin(), pages.begin() + others);
    }
    int32_t* selected = op.selection.row(task);
    std::copy_n(pages.begin(), others, selected);
    selected[others] = last;
    end_list(op.selection, task, others + 1);
  });
}

}  // namespace entmaxkv::cpu
