// score_pages on the CPU. The formulas are in ops.h (ScorePages). With q+ = max(q, 0) and q- = min(q, 0),
//     sum_d max(q_d k_min_d, q_d k_max_d) = q+.k_max + q-.k_min
//     sum_d min(q_d k_min_d, q_d k_max_d) = q+.k_min + q-.k_max
// The sum of the first and `lower` times the second is therefore (q+ + lower q-).k_max + (q- + lower q+).k_min: two dot
// products per page, with page statistics as rows.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "pages.h"
#include "scores.h"

namespace entmaxkv::cpu {

namespace {

template <typename T>
void score_tile(const ScorePages& op, const PageTile& tile) {
  constexpr int kPages = PageTile::kPages;
  const int seq_len = op.seq_lens[tile.row];

  std::vector<float> for_max = queries_of<T>(op, tile.row, tile.kv_head), for_min(for_max.size());
  for (size_t i = 0; i < for_max.size(); ++i) {
    const float value = op.scoring.scale < 0 ? -for_max[i] : for_max[i];
    const float less = op.lower > 0 ? op.lower * value : 0;  // 0 even if value is infinite
    for_max[i] = value < 0 ? less : value;
    for_min[i] = value < 0 ? value : less;
  }
  const T* highs[kPages];
  const T* lows[kPages];
  tile.gather(op.k_max, op.page_table, highs);
  tile.gather(op.k_min, op.page_table, lows);
  std::vector<float> of_max(op.group * kPages), of_min(of_max.size());
  const auto dot = row_kernels<T>().dot;
  dot(highs, tile.used, for_max.data(), op.group, op.head_dim, of_max.data(), kPages);
  dot(lows, tile.used, for_min.data(), op.group, op.head_dim, of_min.data(), kPages);

  const float upper_part = 1 / (1 + op.lower), scale = std::fabs(op.scoring.scale) * upper_part;
  for (int h = 0; h < op.group; ++h) {
    const int head = tile.kv_head * op.group + h;
    const float slope = op.scoring.slope(head);
    float* scores = op.scores + (tile.row * op.q_heads + head) * op.max_pages + tile.first;
    for (int i = 0; i < tile.used; ++i) {
      const int oldest = (tile.first + i) * op.page_size - (seq_len - 1);
      const int newest = std::min(oldest + op.page_size - 1, 0);
      const auto best = static_cast<float>(slope > 0 ? newest : oldest);
      const auto worst = static_cast<float>(slope > 0 ? oldest : newest);
      scores[i] =
          scale * (of_max[h * kPages + i] + of_min[h * kPages + i]) + slope * upper_part * (best + op.lower * worst);
    }
    std::fill(scores + tile.used, scores + tile.width, kNothing);
  }
}

}  // namespace

void score_pages(const ScorePages& op) {
  dispatch(op.dtype, [&](auto element) {
    for_each_page_tile(op, [&](const PageTile& tile) { score_tile<decltype(element)>(op, tile); });
  });
}

}  // namespace entmaxkv::cpu
