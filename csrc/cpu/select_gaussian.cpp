// select_gaussian on the CPU: one task per (row, KV head).
//   1. For each head of the group, find the threshold tau at which the weights are expected to sum to 1:
//          sum over pages of tokens E[(z - tau)_+^beta] = 1,   z ~ N((alpha-1) mean, (alpha-1)^2 std^2)   (gaussian.h)
//      The search starts at the largest (alpha-1) mean less 1, which is below tau by Jensen's inequality.
//   2. Select the pages whose best token is expected to reach tau - margin for some head, and the last page.
#include <vector>

#include "../gaussian.h"
#include "kernels.h"
#include "pages.h"
#include "scores.h"

namespace entmaxkv::cpu {

namespace {

/// Sets is_selected of the pages whose best token is expected to reach one head's threshold.
void select_for_head(const SelectGaussian& op, int64_t row, int head, std::vector<char>& is_selected) {
  const auto used = static_cast<int>(is_selected.size());
  const float* mean = op.mean + (row * op.q_heads + head) * op.max_pages;
  const float* std = op.std + (row * op.q_heads + head) * op.max_pages;
  const Entmax<double> entmax(op.alpha.of(head));
  double tau = kNothing;
  if (!entmax.is_softmax()) {
    for (int page = 0; page < used; ++page) tau = mean[page] > tau ? mean[page] : tau;
    Search<double> search{entmax.gap * tau - 1};
    Expected<double> above;
    do {
      above = {};
      for (int page = 0; page < used; ++page) {
        add_expected<double>(above, entmax.gap * mean[page] - search.tau, entmax.gap * std[page], entmax.beta,
                             tokens_in_page(page, op.seq_lens[row], op.page_size));
      }
    } while (search.advance(entmax, above));
    tau = search.tau;
  }
  const bool all = entmax.is_softmax() || op.margin == -kNothing;
  for (int page = 0; page < used; ++page) {
    is_selected[page] |= all || entmax.gap * (mean[page] + std[page] * op.page_best) > tau - op.margin;
  }
}

}  // namespace

void select_gaussian(const SelectGaussian& op) {
  parallel_for(int64_t{op.batch} * op.kv_heads, [&](int64_t task) {
    const int64_t row = task / op.kv_heads;
    const int kv_head = static_cast<int>(task % op.kv_heads);
    const int used = pages_in_use(op.seq_lens[row], op.page_size);
    std::vector<char> is_selected(used, 0);
    for (int h = 0; h < op.group; ++h) select_for_head(op, row, kv_head * op.group + h, is_selected);
    if (used > 0) is_selected[used - 1] = 1;

    int32_t* selected = op.selection.row(task);
    int count = 0;
    for (int page = 0; page < used; ++page) {
      if (is_selected[page]) selected[count++] = page;
    }
    end_list(op.selection, task, count);
  });
}

}  // namespace entmaxkv::cpu
