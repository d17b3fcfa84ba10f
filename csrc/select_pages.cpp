#include "backend.h"

namespace entmaxkv {

std::tuple<Tensor, Tensor> select_pages(Tensor scores, Tensor seq_lens, int64_t kv_heads, int64_t page_size,
                                        int64_t budget) {
  Arguments args("select_pages");
  args.know("kv_heads", kv_heads);
  args.know("page_size", page_size);
  SelectPages op;
  op.scores = args.values<const float>(scores, "scores [batch, q_heads, max_pages]");
  op.seq_lens = args.snapshot<const int32_t>(seq_lens, "seq_lens [batch]");
  static_cast<Sizes&>(op) = args.sizes();
  args.expect(budget >= 1, "budget", "at least 1 token", budget);
  op.budget = budget;
  check_lengths(args, [&](int row) { return op.seq_lens[row]; });
  const int64_t most = std::min<int64_t>(op.max_pages, (budget - 1) / op.page_size + 1);
  const auto selection = new_selection(scores, op, most, op.selection);
  run(backend::select_pages, op, scores);
  return selection;
}

ENTMAXKV_OP(select_pages,
            "(Tensor scores, Tensor seq_lens, int kv_heads, int page_size, int budget) "
            "-> (Tensor selected, Tensor counts)")

}  // namespace entmaxkv
