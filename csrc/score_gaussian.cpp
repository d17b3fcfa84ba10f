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
  op.page_table = page_table_of(args, page_table);
  op.q = args.rows(q, "q [batch, q_heads, head_dim]", k_mean);
  op.seq_lens = args.snapshot<const int32_t>(seq_lens, "seq_lens [batch]");
  op.scoring = scoring_of(args, scale, alibi_slopes);
  static_cast<Sizes&>(op) = args.sizes();
  check_cache(args, op.page_table, op.seq_lens);
  Tensor mean = new_tensor(q, {op.batch, op.q_heads, op.max_pages}, ScalarType::Float);
  Tensor std = new_tensor(q, {op.batch, op.q_heads, op.max_pages}, ScalarType::Float);
  op.mean = static_cast<float*>(mean.data_ptr());
  op.std = static_cast<float*>(std.data_ptr());
  run(backend::score_gaussian, op, q);
  return {mean, std};
}

ENTMAXKV_OP(score_gaussian,
            "(Tensor q, Tensor k_mean, Tensor k_std, Tensor page_table, Tensor seq_lens, int page_size, "
            "float? scale=None, Tensor? alibi_slopes=None) -> (Tensor mean, Tensor std)")

}  // namespace entmaxkv
