#include "sparse_decode.h"

namespace entmaxkv {

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                                                         Tensor seq_lens, Tensor selected, Tensor counts, double alpha,
                                                         std::optional<double> scale, Optional alibi_slopes,
                                                         Optional head_alpha, bool by_token) {
  Arguments args("sparse_decode");
  return decode_selection(args, q, k_pages, v_pages, page_table, seq_lens, selected, counts, alpha, scale, alibi_slopes,
                          head_alpha, by_token);
}

ENTMAXKV_OP(sparse_decode,
            "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, Tensor selected, "
            "Tensor counts, float alpha=1.5, float? scale=None, Tensor? alibi_slopes=None, Tensor? head_alpha=None, "
            "bool by_token=False) "
            "-> (Tensor out, Tensor tau, Tensor support, Tensor tokens)")

}  // namespace entmaxkv
