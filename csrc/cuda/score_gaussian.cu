// score_gaussian on the GPU.
//   mean = scale q . k_mean, std^2 = scale^2 q^2 . k_std^2. An ALiBi bias is uniform over n successive positions: it
//   moves the mean and adds slope^2 (n^2 - 1) / 12 to the variance.
// Grid (group of query heads, share of the pages, row); a warp scores tiles of 32 pages for up to 8 heads of a group,
// so that the statistics are read once per KV head. Squares are multiplied in fp32: no 16-bit type holds them.
#include "kernels.h"
#include "page_tile.cuh"

namespace entmaxkv::cuda {

namespace {

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * ScanRing<T, Layout>::kWarps, kScanOccupancy<Layout>) score(ScoreGaussian op) {
  take_turn();
  __shared__ Queries<T, Layout> s_q;
  __shared__ Queries<float, Layout> s_squares;
  const PageTiles tiles(op);
  const QueryLoad<T, Layout, 32 * ScanRing<T, Layout>::kWarps> queries(op.q, tiles.row, tiles, op.head_dim);
  const float scale = op.scoring.scale;
  const LaneSlopes slopes(op.scoring, tiles);
  Products products;
  auto stream = tiles.stream<T, Layout>(op.k_mean, op.k_std, op.head_dim);
  stream.run(
      [&] {
        queries.store([&](int h, int d, float q) {
          s_q.set(h, d, q);
          s_squares.set(h, d, q * q);
        });
        __syncthreads();
      },
      [&](int n, const Slot<T, Layout>& slot) {
        products = {};
        if (n % 2 == 0) {
          multiply(slot, s_q, tiles.heads, products);
        } else {
          multiply_plainly<true>(slot, s_squares, tiles.heads, products);
        }
      },
      [&](int n) {
        const bool is_mean = n % 2 == 0;
        tiles.write(op, is_mean ? op.mean : op.std, n / 2, is_mean ? kNothing : 0, [&](int i, int j) {
          const int oldest = tiles.oldest(n / 2, i, op.page_size);
          const auto tokens = static_cast<float>(min(op.page_size, 1 - oldest));
          const float slope = slopes.of[j], product = products.of[i][j];
          return is_mean ? scale * product + slope * (static_cast<float>(oldest) + (tokens - 1) / 2)
                         : sqrtf(scale * scale * product + slope * slope * (tokens * tokens - 1) / 12);
        });
      });
  tiles.write_unused(op, op.mean, kNothing);
  tiles.write_unused(op, op.std, 0);
}

}  // namespace

void score_gaussian(const ScoreGaussian& op, cudaStream_t stream) {
  if (op.batch == 0 || op.max_pages == 0) return;
  const bool vectors = in_vectors(op.k_mean, op.dtype, op.head_dim) && in_vectors(op.k_std, op.dtype, op.head_dim);
  dispatch_element(op.dtype, [&](auto element) {
    dispatch_layout(op.head_dim, vectors, [&](auto layout) {
      using T = decltype(element);
      using Layout = decltype(layout);
      launch("score_gaussian", score<T, Layout>, PageTiles::grid<T, Layout>(op), stream, op);
    });
  });
}

}  // namespace entmaxkv::cuda
