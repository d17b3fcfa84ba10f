// append_kv on the GPU.
//   k, v [batch, tokens, kv_heads, head_dim] -> slots seq_lens[row] ... of the row's pages, and their statistics
// Two threads per dimension of a page and KV head: one for keys, k_min and k_max, the other for values, k_mean and
// k_std. Fetching instructions limits this small kernel, so two groups of threads fetch the halves of its code at once.
//   1. copy: each new key and value is read once and written once, coalesced over the dimensions.
//   2. summarise: all keys of the page are read back, so the statistics depend only on the page's content.
//   3. advance: new_seq_lens is written when all threads have read the old length.
// A sketch of the new keys is written before that, by a launch of its own (build_sketch.cu).
// Up to page_size tokens, append_row: one launch, a cluster of blocks per row.
// More tokens: append_pages, a block per page and KV head; then `advance`, a thread per row.
#include "common/cluster.cuh"
#include "common/copy.cuh"
#include "common/element.cuh"
#include "common/new_tokens.cuh"
#include "common/page_column.cuh"
#include "kernels.h"

namespace entmaxkv::cuda {

namespace {

constexpr int kMostThreads = 1024;

__host__ __device__ int head_threads(int head_dim) { return ceil_div(2 * head_dim, 32) * 32; }

__device__ int page_of(const AppendKv& op, int token) { return token >> log2_of(op.page_size); }

/// Steps 1 and 2 for the nth page that gets new tokens of the row. Threads 0 ... 2 head_dim - 1 work for kv_head;
/// `thread` is this thread's index among those of its KV head. All threads of the block call, also if there is no such
/// page or head.
template <typename T>
__device__ void append_page(const AppendKv& op, int64_t row, const NewTokens& added, int nth, int kv_head, int thread) {
  const bool keys = thread < op.head_dim;
  const int d = keys ? thread : thread - op.head_dim;
  const int page = page_of(op, added.first) + nth, page_begin = page * op.page_size;
  const int start = max(added.first, page_begin), stop = min(added.end, page_begin + op.page_size);
  const bool works = start < stop && d < op.head_dim && kv_head < op.kv_heads;
  int64_t physical = 0;
  if (works) {
    physical = op.page_table.row(row)[page];
    const Rows &from = keys ? op.k : op.v, &to = keys ? op.k_pages : op.v_pages;
#pragma unroll 1
    for (int token = start; token < stop; ++token) {
      to.at<T>(physical, kv_head, token - page_begin)[d] = from.at<T>(row, token - added.first, kv_head)[d];
    }
  }
  __syncthreads();  // the new keys are in their slots
  if (!works) return;
  if (keys) {
    summarise_bounds<T>(op.k_pages, op.statistics, physical, kv_head, stop - page_begin, d);
  } else {
    summarise_moments<T>(op.k_pages, op.statistics, physical, kv_head, stop - page_begin, d);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads) append_row(AppendKv op) {
  wait_for_previous_kernel();
  const int64_t row = blockIdx.y;
  const int width = head_threads(op.head_dim), heads = blockDim.x / width, head = threadIdx.x / width;
  const int thread = threadIdx.x - head * width, place = blockIdx.x * blockDim.x + threadIdx.x;
  if (place * 32 < op.max_pages) prefetch(op.page_table.row(row) + place * 32);
  const NewTokens added(op, row);
  cluster::arrive();
  const int touched = page_of(op, added.first) < page_of(op, added.end - 1) ? 2 : 1;
#pragma unroll 1
  for (int first = blockIdx.x * heads; first < op.kv_heads; first += gridDim.x * heads) {
#pragma unroll 1
    for (int nth = 0; nth < touched; ++nth) append_page<T>(op, row, added, nth, first + head, thread);
  }
  cluster::wait();  // all blocks have read the old length
  if (place == 0) op.new_seq_lens[row] = added.end;
}

template <typename T>
__global__ void append_pages(AppendKv op) {
  wait_for_previous_kernel();
  const int64_t row = blockIdx.z;
  append_page<T>(op, row, NewTokens(op, row), blockIdx.x, blockIdx.y, threadIdx.x);
}

__global__ void advance(AppendKv op) {
  wait_for_previous_kernel();
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < op.batch) op.new_seq_lens[row] = NewTokens(op, row).end;
}

}  // namespace

void append_kv(const AppendKv& op, cudaStream_t stream) {
  if (op.batch == 0 || op.tokens == 0) return;
  if (op.sketch) sketch_new_keys(op, stream);
  dispatch_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    const int threads = head_threads(op.head_dim);
    if (op.tokens <= op.page_size) {
      const int blocks = std::min(cluster::most_blocks(), op.kv_heads);
      const int heads = std::min(ceil_div(op.kv_heads, blocks), kMostThreads / threads);
      launch("append_kv", append_row<T>, {dim3(blocks, op.batch), heads * threads, blocks}, stream, op);
    } else {
      const int pages = (op.tokens - 1) / op.page_size + 2;  // most pages that get tokens of one row
      launch("append_kv", append_pages<T>, {dim3(pages, op.kv_heads, op.batch), threads}, stream, op);
      launch("append_kv", advance, {dim3(ceil_div(op.batch, 128)), 128}, stream, op);
    }
  });
}

}  // namespace entmaxkv::cuda
