// score_pages on the GPU.
//   sum_d max(q_d k_min_d, q_d k_max_d) = q+ . k_max + q- . k_min with q+ = max(q, 0) and q- = min(q, 0)
// Grid (tiles of pages, group of query heads, row); a warp scores 32 pages for up to 16 heads of a group, so that the
// statistics are read once per KV head. Reads k_min and k_max of the pages in use, writes a score for every page.
#include "kernels.h"
#include "page_tile.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kWarps = 4;

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * kWarps, Layout::kRounds == 8 ? 2 : 4) score(ScorePages op) {
  take_turn();
  __shared__ Queries<T, Layout> s_above, s_below;  // q+ and q-
  __shared__ Products s_products[kWarps];
  const PageTile tile(op);
  const T* k_max = tile.statistic<T>(op.k_max);
  const T* k_min = tile.statistic<T>(op.k_min);
  RowStream<T, Layout> rows;
  if (tile.any_in_use()) rows.start(k_max, op.head_dim);
  const float sign = op.scoring.scale < 0 ? -1.0f : 1.0f;
  for_each_query<T, Layout>(op.q, tile.row, tile.first_head, tile.heads, op.head_dim, [&](int h, int d, float q) {
    s_above.set(h, d, sign * q < 0 ? 0 : sign * q);
    s_below.set(h, d, sign * q < 0 ? sign * q : 0);
  });
  __syncthreads();
  Products& products = s_products[threadIdx.x / 32];
  if (tile.any_in_use()) {
    multiply<T, Layout, false>(rows, k_max, k_min, op.head_dim, s_above, tile.heads, products);
    multiply<T, Layout, true>(rows, k_min, nullptr, op.head_dim, s_below, tile.heads, products);
    __syncwarp();
  }
  if (tile.page >= op.max_pages) return;
  const int oldest = tile.page * op.page_size - (tile.seq_len - 1);
  const int newest = min(oldest + op.page_size - 1, 0);
  for (int h = 0; h < tile.heads; ++h) {
    const float slope = op.scoring.slope(tile.first_head + h);
    const float bias = slope * static_cast<float>(slope > 0 ? newest : oldest);
    op.scores[(tile.row * op.q_heads + tile.first_head + h) * op.max_pages + tile.page] =
        tile.in_use() ? fabsf(op.scoring.scale) * products[h][threadIdx.x % 32] + bias : kNothing;
  }
}

}  // namespace

void score_pages(const ScorePages& op, cudaStream_t stream) {
  if (op.batch == 0 || op.max_pages == 0) return;
  const bool vectors = in_vectors(op.k_min, op.dtype, op.head_dim) && in_vectors(op.k_max, op.dtype, op.head_dim);
  dispatch_element(op.dtype, [&](auto element) {
    dispatch_layout(op.head_dim, vectors, [&](auto layout) {
      launch("score_pages", score<decltype(element), decltype(layout)>, PageTile::grid(op, kWarps), stream, op);
    });
  });
}

}  // namespace entmaxkv::cuda
