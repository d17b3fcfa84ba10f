// score_pages on the CPU. sum_d max(q_d k_min_d, q_d k_max_d) = q+ . k_max + q- . k_min with q+ = max(q, 0) and
// q- = min(q, 0), and the sum of minima the other way round: two dot products with page statistics as rows and the
// group's heads, positive or negative coordinates times `lower`, as queries.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "pages.h"

namespace entmaxkv::cpu {

namespace {

template <typename T>
void score_tile(const ScorePages& op, const PageTile& tile) {
  constexpr int kPages = PageTile::kPages;
  const int seq_len = op.seq_lens[tile.row];

  std::vector<float> above(op.group * op.head_dim), below(above.size());  // of k_max and k_min
  for (int h = 0; h < op.group; ++h) {
    const T* q = op.q.at<T>(tile.row, tile.kv_head * op.group + h);
    for (int d = 0; d < op.head_dim; ++d) {
      const float value = op.scoring.scale < 0 ? -to_float(q[d]) : to_float(q[d]);
      const float less = op.lower > 0 ? op.lower * value : 0;
      above[h * op.head_dim + d] = value < 0 ? less : value;
      below[h * op.head_dim + d] = value < 0 ? value : less;
    }
  }
  const T* highs[kPages];
  const T* lows[kPages];
  tile.gather(op.k_max, op.page_table, highs);
  tile.gather(op.k_min, op.page_table, lows);
  std::vector<float> upper(op.group * kPages), lower(upper.size());
  const auto dot = row_kernels<T>().dot;
  dot(highs, tile.used, above.data(), op.group, op.head_dim, upper.data(), kPages);
  dot(lows, tile.used, below.data(), op.group, op.head_dim, lower.data(), kPages);

  const float share = 1 / (1 + op.lower), scale = std::fabs(op.scoring.scale) * share;
  for (int h = 0; h < op.group; ++h) {
    const int head = tile.kv_head * op.group + h;
    const float slope = op.scoring.slope(head);
    float* scores = op.scores + (tile.row * op.q_heads + head) * op.max_pages + tile.first;
    for (int i = 0; i < tile.used; ++i) {
      const int oldest = (tile.first + i) * op.page_size - (seq_len - 1);
      const int newest = std::min(oldest + op.page_size - 1, 0);
      const auto best = static_cast<float>(slope > 0 ? newest : oldest);
      const auto worst = static_cast<float>(slope > 0 ? oldest : newest);
      scores[i] = scale * (upper[h * kPages + i] + lower[h * kPages + i]) + slope * share * (best + op.lower * worst);
    }
    std::fill(scores + tile.used, scores + tile.width, -std::numeric_limits<float>::infinity());
  }
}

}  // namespace

void score_pages(const ScorePages& op) {
  dispatch(op.dtype, [&](auto element) {
    for_each_page_tile(op, [&](const PageTile& tile) { score_tile<decltype(element)>(op, tile); });
  });
}

}  // namespace entmaxkv::cpu
