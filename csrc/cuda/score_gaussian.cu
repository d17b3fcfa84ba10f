// score_gaussian on the GPU.
//   q, k_mean, k_std [pages, kv_heads, head_dim] -> mean, std [batch, q_heads, max_pages]
//   mean = scale q . k_mean,  std^2 = scale^2 sum_d q_d^2 k_std_d^2
// ALiBi biases are equally spaced over the n positions of a page: they move the mean, and add slope^2 (n^2 - 1) / 12 to
// the variance.
// Grid (HeadGroup, part of the pages, row); a warp scores tiles of 32 pages for up to 8 heads of a group, so k_mean and
// k_std of the pages in use are read once per 8 heads. Every page gets a mean and a std. A square of a bf16 is the sum
// of two bf16, which tensor cores multiply; other squares are multiplied in fp32.
#include "common/fast_math.cuh"
#include "common/page_tiles.cuh"
#include "kernels.h"

namespace entmaxkv::cuda {

namespace {

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * ScanRing<T, Layout>::kWarps, kScanOccupancy<Layout>) score(ScoreGaussian op) {
  wait_for_previous_kernel();
  __shared__ Queries<T, Layout> s_q;
  constexpr bool kInHalves = std::is_same_v<T, __nv_bfloat16>;
  __shared__ Queries<std::conditional_t<kInHalves, T, float>, Layout>
      s_squares[kInHalves ? 2 : 1];  // high and low parts
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
          s_squares[0].set(h, d, q * q);
          if constexpr (kInHalves) s_squares[1].set(h, d, q * q - to_float(from_float<T>(q * q)));
        });
        __syncthreads();
      },
      [&](int n, const Slot<T, Layout>& slot) {
        products = {};
        if (n % 2 == 0) {
          multiply(slot, s_q, tiles.heads, products);
        } else if constexpr (kInHalves) {
          multiply_squares(slot, s_squares[0], s_squares[1], products);
        } else {
          multiply_plainly<true>(slot, s_squares[0], tiles.heads, products);
        }
      },
      [&](int n) {
        const auto tokens = [&](int oldest) { return static_cast<float>(min(op.page_size, 1 - oldest)); };
        if (n % 2 == 0) {
          tiles.write(op, op.mean, n / 2, kNothing, [&](int i, int j) {
            const int oldest = tiles.oldest(n / 2, i, op.page_size);
            return scale * products.of[i][j] + slopes.of[j] * (static_cast<float>(oldest) + (tokens(oldest) - 1) / 2);
          });
        } else {
          tiles.write(op, op.std, n / 2, 0, [&](int i, int j) {
            const float slope = slopes.of[j], count = tokens(tiles.oldest(n / 2, i, op.page_size));
            return square_root(scale * scale * products.of[i][j] + slope * slope * (count * count - 1) * (1.0f / 12));
          });
        }
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
