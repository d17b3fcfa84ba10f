#include "backend.h"

namespace entmaxkv {

namespace {

/// How much of the proved error counts at a certainty below 1. After the rotation the error of a product is a sum of
/// random signs over the dimensions, of variance at most (||q|| e)^2 / size for Hadamard matrices of that size: beyond
/// t standard deviations with a probability of at most 2 exp(-t^2 / 2).
float share_of_error(double certainty, int head_dim) {
  if (certainty == 1) return 1;
  const double deviations = std::sqrt(2 * std::log(2 / (1 - certainty)));
  const double size = sketch::rotation_of(sketch::dims_of(head_dim));
  return static_cast<float>(std::min(1.0, deviations / std::sqrt(size)));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> select_sketch(Tensor q, Tensor k_pages, Tensor codes, Tensor norms,
                                                 Tensor page_table, Tensor seq_lens, double alpha,
                                                 std::optional<double> scale, Optional alibi_slopes,
                                                 Optional head_alpha, int64_t bits, double certainty,
                                                 std::optional<int64_t> max_tokens) {
  Arguments args("select_sketch");
  SelectSketch op;
  op.dtype = args.element(k_pages, "k_pages");
  op.k_pages = args.rows(k_pages, "k_pages [pages, kv_heads, page_size, head_dim]", k_pages);
  op.sketch = sketch_of(args, codes, norms);
  op.page_table = page_table_of(args, page_table);
  op.q = args.rows(q, "q [batch, q_heads, head_dim]", k_pages);
  op.seq_lens = args.snapshot<const int32_t>(seq_lens, "seq_lens [batch]");
  op.alpha = alpha_of(args, alpha, head_alpha);
  op.scoring = scoring_of(args, scale, alibi_slopes);
  static_cast<Sizes&>(op) = args.sizes();
  args.expect(bits == 2 || bits == 4, "bits", "2 or 4", bits);
  args.expect(certainty > 0 && certainty <= 1, "certainty", "a number above 0, at most 1", certainty);
  args.expect(!max_tokens || *max_tokens >= 1, "max_tokens", "at least 1", max_tokens.value_or(1));
  op.fine = bits == 4;
  op.certain = share_of_error(certainty, op.head_dim);
  check_cache(args, op.page_table, op.seq_lens);
  const int64_t room = int64_t{op.max_pages} * op.page_size;
  auto [selected, counts] = new_selection(q, op, std::min(room, max_tokens.value_or(room)), op.selection);
  op.selection.by_token = true;
  Tensor delta_bound = new_tensor(q, {op.batch, op.q_heads}, ScalarType::Float);
  op.delta_bound = static_cast<float*>(delta_bound.data_ptr());
  run(backend::select_sketch, op, q);
  return {selected, counts, delta_bound};
}

ENTMAXKV_OP(select_sketch,
            "(Tensor q, Tensor k_pages, Tensor codes, Tensor norms, Tensor page_table, Tensor seq_lens, "
            "float alpha=1.5, float? scale=None, Tensor? alibi_slopes=None, Tensor? head_alpha=None, int bits=4, "
            "float certainty=1.0, int? max_tokens=None) -> (Tensor selected, Tensor counts, Tensor delta_bound)")

}  // namespace entmaxkv
