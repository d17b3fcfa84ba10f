// score_gaussian on the GPU.
//   mean = scale q . k_mean, std^2 = scale^2 q^2 . k_std^2. An ALiBi bias is uniform over n successive positions: it
//   moves the mean and adds slope^2 (n^2 - 1) / 12 to the variance.
// Grid (tiles of pages, group of query heads, row); a warp scores 32 pages for up to 16 heads of a group, so that the
// statistics are read once per KV head. Squares are multiplied in fp32: no 16-bit type holds them.
#include "kernels.h"
#include "page_tile.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kWarps = 4;

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * kWarps) score(ScoreGaussian op) {
  take_turn();
  __shared__ Queries<T, Layout> s_q;
  __shared__ Queries<float, Layout> s_squares;
  __shared__ Products s_products[kWarps];
  const PageTile tile(op);
  const T* k_mean = tile.statistic<T>(op.k_mean);
  const T* k_std = tile.statistic<T>(op.k_std);
  RowStream<T, Layout> rows;
  if (tile.any_in_use()) rows.start(k_mean, op.head_dim);
  for_each_query<T, Layout>(op.q, tile.row, tile.first_head, tile.heads, op.head_dim, [&](int h, int d, float q) {
    s_q.set(h, d, q);
    s_squares.set(h, d, q * q);
  });
  __syncthreads();
  Products& products = s_products[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const float scale = op.scoring.scale;
  const auto tokens = static_cast<float>(min(op.page_size, tile.seq_len - tile.page * op.page_size));
  const auto oldest = static_cast<float>(tile.page * op.page_size - (tile.seq_len - 1));

  // Writes value(product, slope), or what stands for a page not in use, for every head.
  const auto write = [&](float* to, float unused, auto value) {
    if (tile.page >= op.max_pages) return;
    for (int h = 0; h < tile.heads; ++h) {
      const int head = tile.first_head + h;
      to[(tile.row * op.q_heads + head) * op.max_pages + tile.page] =
          tile.in_use() ? value(products[h][lane], op.scoring.slope(head)) : unused;
    }
  };
  if (tile.any_in_use()) {
    multiply<T, Layout, false>(rows, k_mean, k_std, op.head_dim, s_q, tile.heads, products);
    __syncwarp();
  }
  write(op.mean, kNothing,
        [=](float product, float slope) { return scale * product + slope * (oldest + (tokens - 1) / 2); });
  if (tile.any_in_use()) {
    __syncwarp();  // the means have been read
    multiply_plainly<T, Layout, true, false>(rows, k_std, nullptr, op.head_dim, s_squares, tile.heads, products);
    __syncwarp();
  }
  write(op.std, 0.0f, [=](float product, float slope) {
    return sqrtf(scale * scale * product + slope * slope * (tokens * tokens - 1) / 12);
  });
}

}  // namespace

void score_gaussian(const ScoreGaussian& op, cudaStream_t stream) {
  if (op.batch == 0 || op.max_pages == 0) return;
  const bool vectors = in_vectors(op.k_mean, op.dtype, op.head_dim) && in_vectors(op.k_std, op.dtype, op.head_dim);
  dispatch_element(op.dtype, [&](auto element) {
    dispatch_layout(op.head_dim, vectors, [&](auto layout) {
      launch("score_gaussian", score<decltype(element), decltype(layout)>, PageTile::grid(op, kWarps), stream, op);
    });
  });
}

}  // namespace entmaxkv::cuda
