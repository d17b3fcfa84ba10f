// The op decode: score_pages, select_pages and sparse_decode in one call.
#include "backend.h"

namespace entmaxkv {

Tensor score_pages(Tensor q, Tensor k_min, Tensor k_max, Tensor page_table, Tensor seq_lens, int64_t page_size,
                   std::optional<double> scale, Optional alibi_slopes, double lower);
std::tuple<Tensor, Tensor> select_pages(Tensor scores, Tensor seq_lens, int64_t kv_heads, int64_t page_size,
                                        int64_t budget);
std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                                                         Tensor seq_lens, Tensor selected, Tensor counts, double alpha,
                                                         std::optional<double> scale, Optional alibi_slopes,
                                                         Optional head_alpha, bool by_token);

Tensor decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor k_min, Tensor k_max, Tensor page_table, Tensor seq_lens,
              int64_t budget, double alpha, std::optional<double> scale, Optional alibi_slopes, Optional head_alpha) {
  Arguments args("decode");
  args.shape(k_pages, "k_pages [pages, kv_heads, page_size, head_dim]");
  if constexpr (kOnHost) {  // the three ops must see the same lengths, even if another thread appends
    const int32_t* lengths = args.snapshot<const int32_t>(seq_lens, "seq_lens [batch]");
    seq_lens = new_tensor(seq_lens, {args["batch"]}, ScalarType::Int);
    std::copy_n(lengths, args["batch"], static_cast<int32_t*>(seq_lens.data_ptr()));
  }
  const Tensor scores =
      score_pages(q, k_min, k_max, page_table, seq_lens, args["page_size"], scale, alibi_slopes, kRankLower);
  const auto [selected, counts] = select_pages(scores, seq_lens, args["kv_heads"], args["page_size"], budget);
  return std::get<0>(sparse_decode(q, k_pages, v_pages, page_table, seq_lens, selected, counts, alpha, scale,
                                   alibi_slopes, head_alpha, false));
}

ENTMAXKV_OP(
    decode,
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor k_min, Tensor k_max, Tensor page_table, Tensor seq_lens, "
    "int budget, float alpha=1.5, float? scale=None, Tensor? alibi_slopes=None, Tensor? head_alpha=None) "
    "-> Tensor")

}  // namespace entmaxkv
