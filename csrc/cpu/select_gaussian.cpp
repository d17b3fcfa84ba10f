// select_gaussian on the CPU.
//   1. per query head: the threshold tau at which the page mixture expects weights that sum to 1,
//      sum_pages tokens E[(z - tau)_+^beta] = 1 with z ~ N((alpha-1) mean, (alpha-1)^2 std^2) (gaussian.h), from
//      the best page mean minus 1 on, which lies left of it by Jensen's inequality
//   2. per KV head: the pages that any head of the group wants, and the last page
#include <cmath>
#include <limits>
#include <vector>

#include "../gaussian.h"
#include "kernels.h"
#include "pages.h"

namespace entmaxkv::cpu {

namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

/// Marks the pages that one head wants.
void want_pages(const SelectGaussian& op, int64_t row, int head, int used, std::vector<char>& wanted) {
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
    wanted[page] |= all || entmax.gap * (mean[page] + std[page] * op.page_best) > tau - op.margin;
  }
}

}  // namespace

void select_gaussian(const SelectGaussian& op) {
  parallel_for(int64_t{op.batch} * op.kv_heads, [&](int64_t task) {
    const int64_t row = task / op.kv_heads;
    const int kv_head = static_cast<int>(task % op.kv_heads);
    const int used = pages_in_use(op.seq_lens[row], op.page_size);
    std::vector<char> wanted(used, 0);
    for (int h = 0; h < op.group; ++h) want_pages(op, row, kv_head * op.group + h, used, wanted);
    if (used > 0) wanted[used - 1] = 1;

    int32_t* selected = op.selection.row(task);
    int count = 0;
    for (int page = 0; page < used; ++page) {
      if (wanted[page]) selected[count++] = page;
    }
    std::fill(selected + count, selected + op.selection.max_selected, -1);
    op.selection.counts[task] = count;
  });
}

}  // namespace entmaxkv::cpu
