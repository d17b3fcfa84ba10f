#include "backend.h"

namespace entmaxkv {

Tensor score_pages(Tensor q, Tensor k_min, Tensor k_max, Tensor page_table, Tensor seq_lens, int64_t page_size,
                   std::optional<double> scale, Optional alibi_slopes, double lower) {
  Arguments args("score_pages");
  args.know("page_size", page_size);
  ScorePages op;
  op.dtype = args.element(k_min, "k_min");
  op.k_min = args.rows(k_min, "k_min [pages, kv_heads, head_dim]", k_min);
  op.k_max = args.rows(k_max, "k_max [pages, kv_heads, head_dim]", k_min);
  take_queries(args, op, q, page_table, seq_lens, k_min, scale, alibi_slopes);
  args.expect(lower >= 0 && lower <= 1, "lower", "0 ... 1", lower);
  op.lower = static_cast<float>(lower);
  Tensor scores = new_values(q, {op.batch, op.q_heads, op.max_pages}, op.scores);
  run(backend::score_pages, op, q);
  return scores;
}

ENTMAXKV_OP(score_pages,
            "(Tensor q, Tensor k_min, Tensor k_max, Tensor page_table, Tensor seq_lens, int page_size, "
            "float? scale=None, Tensor? alibi_slopes=None, float lower=0.0) -> Tensor")

}  // namespace entmaxkv
