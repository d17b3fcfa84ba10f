// append_kv on the GPU.
//   k, v [batch, tokens, kv_heads, head_dim] -> slots seq_lens[row] ... of the row's pages, and their statistics
// A thread owns one dimension of one page of one KV head.
//   1. copy: each new key and value is read and written once, coalesced over the dimensions
//   2. summarise: the page's keys, old ones included, are read back, so that the statistics depend on the page's
//      content alone
//   3. advance: seq_lens moves when no page of the row is unfinished any more
// Up to a page of tokens: a block does all of that for a row, in one launch. More: a block per page and KV head, and
// seq_lens moves in a second launch, when every block has read the old lengths.
#include "kernels.h"
#include "page_stats.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kRowThreads = 1024;

/// The new tokens of a row: never more than k and v hold, whatever `lengths` says, or than the cache has room for.
struct Span {
  int first, end;

  __device__ Span(const AppendKv& op, int64_t row) : first(max(0, op.seq_lens[row])) {
    const int tokens = op.lengths ? max(0, min(op.lengths[row], op.tokens)) : op.tokens;
    end = min(first + tokens, op.max_pages * op.page_size);
  }
};

/// Copies and summarises one dimension of the nth page that the row's new tokens touch.
template <typename T>
__device__ void append_page(const AppendKv& op, int64_t row, const Span& span, int nth, int kv_head, int d) {
  const int page = span.first / op.page_size + nth;
  const int start = max(span.first, page * op.page_size);
  const int stop = min(span.end, (page + 1) * op.page_size);
  if (start >= stop) return;
  const int64_t physical = op.page_table.row(row)[page];
  for (int token = start; token < stop; ++token) {
    const int slot = token % op.page_size;
    op.k_pages.at<T>(physical, kv_head, slot)[d] = op.k.at<T>(row, token - span.first, kv_head)[d];
    op.v_pages.at<T>(physical, kv_head, slot)[d] = op.v.at<T>(row, token - span.first, kv_head)[d];
  }
  summarise_page<T>(op.k_pages, op.statistics, physical, kv_head, stop - page * op.page_size, d);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) append_row(AppendKv op) {
  take_turn();
  const int64_t row = blockIdx.x;
  const Span span(op, row);
  for (int i = threadIdx.x; i < op.kv_heads * op.head_dim; i += blockDim.x) {
    for (int nth = 0; nth < 2; ++nth) append_page<T>(op, row, span, nth, i / op.head_dim, i % op.head_dim);
  }
  __syncthreads();  // all have read the old length
  if (threadIdx.x == 0) op.seq_lens[row] = span.end;
}

template <typename T>
__global__ void append_pages(AppendKv op) {
  take_turn();
  const int64_t row = blockIdx.z;
  const Span span(op, row);
  if (threadIdx.x < op.head_dim) append_page<T>(op, row, span, blockIdx.x, blockIdx.y, threadIdx.x);
}

__global__ void advance(AppendKv op) {
  take_turn();
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < op.batch) op.seq_lens[row] = Span(op, row).end;
}

}  // namespace

void append_kv(const AppendKv& op, cudaStream_t stream) {
  if (op.batch == 0 || op.tokens == 0) return;
  dispatch_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    if (op.tokens <= op.page_size) {
      const int threads = std::min(kRowThreads, ceil_div(op.kv_heads * op.head_dim, 32) * 32);
      launch("append_kv", append_row<T>, {dim3(op.batch), threads}, stream, op);
    } else {
      const int pages = (op.tokens - 1) / op.page_size + 2;  // that one row can touch
      const int threads = ceil_div(op.head_dim, 32) * 32;
      launch("append_kv", append_pages<T>, {dim3(pages, op.kv_heads, op.batch), threads}, stream, op);
      launch("append_kv", advance, {dim3(ceil_div(op.batch, 128)), 128}, stream, op);
    }
  });
}

}  // namespace entmaxkv::cuda
