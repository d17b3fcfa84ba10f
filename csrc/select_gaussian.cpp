#include "backend.h"

namespace entmaxkv {

namespace {

/// The x that the largest of `count` standard normal numbers stays below with probability `quantile`. It solves
/// Phi(x)^count = quantile, where Phi is the normal distribution, by bisection.
double score_of_best(double quantile, int count) {
  const double each = std::pow(quantile, 1.0 / count);
  double low = -40, high = 40;
  for (int i = 0; i < 64; ++i) {
    const double middle = (low + high) / 2;
    (std::erfc(-middle / std::sqrt(2.0)) / 2 < each ? low : high) = middle;
  }
  return low;
}

}  // namespace

std::tuple<Tensor, Tensor> select_gaussian(Tensor mean, Tensor deviation, Tensor seq_lens, int64_t kv_heads,
                                           int64_t page_size, double alpha, double quantile, double margin,
                                           Optional head_alpha) {
  Arguments args("select_gaussian");
  args.know("kv_heads", kv_heads);
  args.know("page_size", page_size);
  SelectGaussian op;
  op.mean = args.values<const float>(mean, "mean [batch, q_heads, max_pages]");
  op.std = args.values<const float>(deviation, "std [batch, q_heads, max_pages]");
  op.seq_lens = args.snapshot<const int32_t>(seq_lens, "seq_lens [batch]");
  static_cast<Sizes&>(op) = args.sizes();
  op.alpha = alpha_of(args, alpha, head_alpha);
  args.expect(quantile > 0 && quantile < 1, "quantile", "a number between 0 and 1", quantile);
  args.expect(!std::isnan(margin), "margin", "a number", margin);
  op.page_best = score_of_best(quantile, op.page_size);
  op.margin = margin;
  check_lengths(args, [&](int row) { return op.seq_lens[row]; });
  const auto selection = new_selection(mean, op, op.max_pages, op.selection);
  run(backend::select_gaussian, op, mean);
  return selection;
}

ENTMAXKV_OP(select_gaussian,
            "(Tensor mean, Tensor std, Tensor seq_lens, int kv_heads, int page_size, float alpha=1.5, "
            "float quantile=0.99, float margin=0.0, Tensor? head_alpha=None) -> (Tensor selected, Tensor counts)")

}  // namespace entmaxkv
