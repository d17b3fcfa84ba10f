#include "sparse_decode.h"

namespace entmaxkv {

std::tuple<Tensor, Tensor, Tensor, Tensor> dense_decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                                                        Tensor seq_lens, double alpha, std::optional<double> scale,
                                                        Optional alibi_slopes, Optional head_alpha) {
  Arguments args("dense_decode");
  return decode_selection(args, q, k_pages, v_pages, page_table, seq_lens, {}, {}, alpha, scale, alibi_slopes,
                          head_alpha, false);
}

ENTMAXKV_OP(dense_decode,
            "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, float alpha=1.5, "
            "float? scale=None, Tensor? alibi_slopes=None, Tensor? head_alpha=None) "
            "-> (Tensor out, Tensor tau, Tensor support, Tensor tokens)")

}  // namespace entmaxkv
