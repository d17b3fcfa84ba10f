#include "backend.h"

namespace entmaxkv {

std::tuple<Tensor, Tensor> score_gaussian(Tensor q, Tensor k_mean, Tensor k_std, Tensor page_table, Tensor seq_lens,
                                          int64_t page_size, std::optional<double> scale, Optional alibi_slopes) {
  Arguments args("score_gaussian");
  args.know("page_size", page_size);
  ScoreGaussian op;
  op.dtype = args.element(k_mean, "k_mean");
  op.k_mean = args.rows(k_mean, "k_mean [pages, kv_heads, head_dim]", k_mean);
  op.k_std = args.rows(k_std, "k_std [pages, kv_heads, head_dim]", k_mean);
  take_queries(args, op, q, page_table, seq_lens, k_mean, scale, alibi_slopes);
  Tensor mean = new_values(q, {op.batch, op.q_heads, op.max_pages}, op.mean);
  Tensor std = new_values(q, {op.batch, op.q_heads, op.max_pages}, op.std);
  run(backend::score_gaussian, op, q);
  return {mean, std};
}

ENTMAXKV_OP(score_gaussian,
            "(Tensor q, Tensor k_mean, Tensor k_std, Tensor page_table, Tensor seq_lens, int page_size, "
            "float? scale=None, Tensor? alibi_slopes=None) -> (Tensor mean, Tensor std)")

}  // namespace entmaxkv
