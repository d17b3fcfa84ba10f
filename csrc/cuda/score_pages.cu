// score_pages on the GPU.
//   q, k_min, k_max [pages, kv_heads, head_dim] -> scores [batch, q_heads, max_pages]
//   score = (U + lower L) / (1 + lower), scaled and with ALiBi biases (ops.h), with q+ = max(q, 0) and q- = min(q, 0):
//   U = sum_d max(q_d k_min_d, q_d k_max_d) = q+ . k_max + q- . k_min,  L = q+ . k_min + q- . k_max
// So score = (q+ + lower q-) . k_max + (q- + lower q+) . k_min, up to the factor. If `lower` is a power of two, these
// queries are exact in their type.
// Grid (HeadGroup, part of the pages, row); a warp scores tiles of 32 pages for up to 8 heads of a group, so k_min and
// k_max of the pages in use are read once per 8 heads. Every page gets a score.
#include "common/page_tiles.cuh"
#include "kernels.h"

namespace entmaxkv::cuda {

namespace {

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * ScanRing<T, Layout>::kWarps, kScanOccupancy<Layout>) score(ScorePages op) {
  wait_for_previous_kernel();
  __shared__ Queries<T, Layout> s_q[2];  // the queries for k_max and for k_min
  const PageTiles tiles(op);
  const QueryLoad<T, Layout, 32 * ScanRing<T, Layout>::kWarps> queries(op.q, tiles.row, tiles, op.head_dim);
  const float lower = op.lower, normaliser = 1 / (1 + lower);
  const float scale = fabsf(op.scoring.scale) * normaliser, sign = op.scoring.scale < 0 ? -1.0f : 1.0f;
  const LaneSlopes slopes(op.scoring, tiles);
  Products products;
  auto stream = tiles.stream<T, Layout>(op.k_max, op.k_min, op.head_dim);
  stream.run(
      [&] {
        queries.store([&](int h, int d, float q) {
          const float value = sign * q, less = lower > 0 ? lower * value : 0;
          s_q[0].set(h, d, value < 0 ? less : value);
          s_q[1].set(h, d, value < 0 ? value : less);
        });
        __syncthreads();
      },
      [&](int n, const Slot<T, Layout>& slot) {
        if (n % 2 == 0) products = {};
        multiply(slot, s_q[n % 2], tiles.heads, products);
      },
      [&](int n) {
        if (n % 2 == 0) return;
        tiles.write(op, op.scores, n / 2, kNothing, [&](int i, int j) {
          const int oldest = tiles.oldest(n / 2, i, op.page_size), newest = min(oldest + op.page_size - 1, 0);
          const auto best = static_cast<float>(slopes.of[j] > 0 ? newest : oldest);
          const auto worst = static_cast<float>(slopes.of[j] > 0 ? oldest : newest);
          return scale * products.of[i][j] + slopes.of[j] * normaliser * (best + lower * worst);
        });
      });
  tiles.write_unused(op, op.scores, kNothing);
}

}  // namespace

void score_pages(const ScorePages& op, cudaStream_t stream) {
  if (op.batch == 0 || op.max_pages == 0) return;
  const bool vectors = in_vectors(op.k_min, op.dtype, op.head_dim) && in_vectors(op.k_max, op.dtype, op.head_dim);
  dispatch_element(op.dtype, [&](auto element) {
    dispatch_layout(op.head_dim, vectors, [&](auto layout) {
      using T = decltype(element);
      using Layout = decltype(layout);
      launch("score_pages", score<T, Layout>, PageTiles::grid<T, Layout>(op), stream, op);
    });
  });
}

}  // namespace entmaxkv::cuda
