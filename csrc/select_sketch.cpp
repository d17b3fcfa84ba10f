#include "backend.h"

namespace entmaxkv {

namespace {

/// The factor by which the sketch's proved error is multiplied so that a bound holds with probability `certainty`. The
/// proved error is ||q|| e, where e is the norm of a key's distance from its values. The signs of the rotation make the
/// error of a product like a sum of terms with random signs. With Hadamard matrices of `size` dimensions its variance
/// is at most (||q|| e)^2 / size. It exceeds t standard deviations with a probability of at most 2 exp(-t^2 / 2).
float error_factor_of(double certainty, int head_dim) {
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
  take_keys(args, op, k_pages);
  op.sketch = sketch_of(args, codes, norms);
  take_queries(args, op, q, page_table, seq_lens, k_pages, scale, alibi_slopes);
  op.alpha = alpha_of(args, alpha, head_alpha);
  args.expect(bits == 2 || bits == 4, "bits", "2 or 4", bits);
  args.expect(certainty > 0 && certainty <= 1, "certainty", "a number above 0, at most 1", certainty);
  args.expect(!max_tokens || *max_tokens >= 1, "max_tokens", "at least 1", max_tokens.value_or(1));
  op.fine = bits == 4;
  op.error_factor = error_factor_of(certainty, op.head_dim);
  const int64_t room = int64_t{op.max_pages} * op.page_size;
  auto [selected, counts] = new_selection(q, op, std::min(room, max_tokens.value_or(room)), op.selection);
  op.selection.by_token = true;
  Tensor delta_bound = new_values(q, {op.batch, op.q_heads}, op.delta_bound);
  run(backend::select_sketch, op, q);
  return {selected, counts, delta_bound};
}

ENTMAXKV_OP(select_sketch,
            "(Tensor q, Tensor k_pages, Tensor codes, Tensor norms, Tensor page_table, Tensor seq_lens, "
            "float alpha=1.5, float? scale=None, Tensor? alibi_slopes=None, Tensor? head_alpha=None, int bits=4, "
            "float certainty=1.0, int? max_tokens=None) -> (Tensor selected, Tensor counts, Tensor delta_bound)")

}  // namespace entmaxkv
