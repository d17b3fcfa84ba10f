// score_gaussian on the CPU. The formulas are in ops.h (ScoreGaussian). Two dot products per page: of q with the means,
// and of the squares of q with the squared deviations. The ALiBi bias takes n equidistant values over the n tokens of a
// page, slope apart: their mean is the mean of the first and the last, their variance is slope^2 (n^2 - 1) / 12.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "pages.h"
#include "scores.h"

namespace entmaxkv::cpu {

namespace {

template <typename T>
void score_tile(const ScoreGaussian& op, const PageTile& tile) {
  constexpr int kPages = PageTile::kPages;
  const int seq_len = op.seq_lens[tile.row];
  const float scale = op.scoring.scale;

  const std::vector<float> q = queries_of<T>(op, tile.row, tile.kv_head);
  std::vector<float> squares(q.size());
  for (size_t i = 0; i < q.size(); ++i) squares[i] = q[i] * q[i];
  const T* means[kPages];
  const T* stds[kPages];
  tile.gather(op.k_mean, op.page_table, means);
  tile.gather(op.k_std, op.page_table, stds);
  std::vector<float> centre(op.group * kPages), spread(centre.size());
  const auto& kernels = row_kernels<T>();
  kernels.dot(means, tile.used, q.data(), op.group, op.head_dim, centre.data(), kPages);
  kernels.dot_squares(stds, tile.used, squares.data(), op.group, op.head_dim, spread.data(), kPages);

  for (int h = 0; h < op.group; ++h) {
    const int head = tile.kv_head * op.group + h;
    const float slope = op.scoring.slope(head);
    const int64_t at = (tile.row * op.q_heads + head) * op.max_pages + tile.first;
    float* mean = op.mean + at;
    float* std = op.std + at;
    for (int i = 0; i < tile.used; ++i) {
      const int page = tile.first + i;
      const auto tokens = static_cast<float>(tokens_in_page(page, seq_len, op.page_size));
      const auto oldest = static_cast<float>(page * op.page_size - (seq_len - 1));
      mean[i] = scale * centre[h * kPages + i] + slope * (oldest + (tokens - 1) / 2);
      std[i] = std::sqrt(scale * scale * spread[h * kPages + i] + slope * slope * (tokens * tokens - 1) / 12);
    }
    std::fill(mean + tile.used, mean + tile.width, kNothing);
    std::fill(std + tile.used, std + tile.width, 0.0f);
  }
}

}  // namespace

void score_gaussian(const ScoreGaussian& op) {
  dispatch(op.dtype, [&](auto element) {
    for_each_page_tile(op, [&](const PageTile& tile) { score_tile<decltype(element)>(op, tile); });
  });
}

}  // namespace entmaxkv::cpu
