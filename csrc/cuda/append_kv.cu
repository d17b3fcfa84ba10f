// append_kv on the GPU.
//   k, v [batch, tokens, kv_heads, head_dim] -> slots seq_lens[row] ... of the row's pages, and their statistics
// Grid (page that a row can touch, KV head, row); a block owns one page of one KV head, a thread one dimension.
//   1. copy: each new key and value is read and written once, coalesced over the dimensions
//   2. summarise: the page's keys, old ones included, are read back, so that the statistics depend on the page's
//      content alone
//   3. advance: seq_lens moves in a launch of its own, when every block has read the old lengths and no page is
//      unfinished
#include "kernels.h"
#include "page_stats.cuh"

namespace entmaxkv::cuda {

namespace {

/// Never more than k and v hold, whatever `lengths` says.
__device__ int new_tokens(const AppendKv& op, int64_t row) {
  return op.lengths ? max(0, min(op.lengths[row], op.tokens)) : op.tokens;
}

template <typename T>
__global__ void append_page(AppendKv op) {
  const int kv_head = blockIdx.y;
  const int64_t row = blockIdx.z;
  const int d = threadIdx.x;
  const int first = op.seq_lens[row];
  const int end = min(first + new_tokens(op, row), op.max_pages * op.page_size);
  const int page = first / op.page_size + blockIdx.x;
  const int start = max(first, page * op.page_size);
  const int stop = min(end, (page + 1) * op.page_size);
  if (start >= stop || d >= op.head_dim) return;
  const int64_t physical = op.page_table.row(row)[page];
  for (int token = start; token < stop; ++token) {
    const int slot = token % op.page_size;
    op.k_pages.at<T>(physical, kv_head, slot)[d] = op.k.at<T>(row, token - first, kv_head)[d];
    op.v_pages.at<T>(physical, kv_head, slot)[d] = op.v.at<T>(row, token - first, kv_head)[d];
  }
  summarise_page<T>(op.k_pages, op.statistics, physical, kv_head, stop - page * op.page_size, d);
}

__global__ void advance(AppendKv op) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= op.batch) return;
  op.seq_lens[row] = min(op.seq_lens[row] + new_tokens(op, row), op.max_pages * op.page_size);
}

}  // namespace

void append_kv(const AppendKv& op, cudaStream_t stream) {
  if (op.batch == 0 || op.tokens == 0) return;
  const int most_pages = (op.tokens - 1) / op.page_size + 2;  // that one row can touch
  const dim3 grid(most_pages, op.kv_heads, op.batch);
  const int threads = (op.head_dim + 31) / 32 * 32;
  dispatch(op.dtype, [&](auto element) { append_page<decltype(element)><<<grid, threads, 0, stream>>>(op); });
  check_launch("append_kv");
  advance<<<(op.batch + 127) / 128, 128, 0, stream>>>(op);
  check_launch("append_kv");
}

}  // namespace entmaxkv::cuda
