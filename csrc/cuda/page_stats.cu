// page_stats on the GPU.
//   k_pages [pages, kv_heads, page_size, head_dim] -> k_min, k_max, k_mean, k_std [pages, kv_heads, head_dim]
// Grid (logical page, KV head, row): a block per page and KV head, a thread per dimension (page_column.cuh). Each
// statistic is written once. k_min and k_max take one pass over the page's keys, k_mean and k_std two; the second of
// these reads from registers if the page has at most 16 tokens.
#include "common/launch.cuh"
#include "common/page_column.cuh"
#include "common/sizes.cuh"
#include "kernels.h"

namespace entmaxkv::cuda {

namespace {

template <typename T>
__global__ void summarise(PageStats op) {
  wait_for_previous_kernel();
  const int page = blockIdx.x;
  const int64_t row = blockIdx.z;
  const int d = threadIdx.x;
  const int tokens = min(op.page_size, length_of(op, row) - page * op.page_size);
  if (tokens <= 0 || d >= op.head_dim) return;
  const int64_t physical = op.page_table.row(row)[page];
  summarise_bounds<T>(op.k_pages, op.statistics, physical, blockIdx.y, tokens, d);
  summarise_moments<T>(op.k_pages, op.statistics, physical, blockIdx.y, tokens, d);
}

}  // namespace

void page_stats(const PageStats& op, cudaStream_t stream) {
  if (op.batch == 0 || op.max_pages == 0) return;
  const dim3 grid(op.max_pages, op.kv_heads, op.batch);
  const int threads = ceil_div(op.head_dim, 32) * 32;
  dispatch_element(
      op.dtype, [&](auto element) { launch("page_stats", summarise<decltype(element)>, {grid, threads}, stream, op); });
}

}  // namespace entmaxkv::cuda
