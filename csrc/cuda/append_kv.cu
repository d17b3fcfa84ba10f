// append_kv on the GPU.
//   k, v [batch, tokens, kv_heads, head_dim] -> slots seq_lens[row] ... of the row's pages, and their statistics
// Two threads for each dimension of a page of a KV head: one for keys and bounds, one for values and moments. A kernel
// of so little work is as long as its code, which thus is read by different warps at the same time.
//   1. copy: each new key and value is read and written once, coalesced over the dimensions
//   2. summarise: the page's keys, old ones included, are read back, so that the statistics depend on the page's
//      content alone
//   3. sketch: a warp codes a new key at a time, one that has no statistic to find the first
//   4. advance: seq_lens moves when all have read the old length
// Up to a page of tokens: a cluster of blocks does all of that for a row, in one launch. More: a block per page and KV
// head, and seq_lens moves in a second launch.
#include "cluster.cuh"
#include "kernels.h"
#include "key_sketch.cuh"
#include "page_stats.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kMostThreads = 2 * kMaxHeadDim;

/// Of a KV head: two for each dimension, and a warp to code the key, if there can be one more.
__host__ __device__ int head_threads(const AppendKv& op) {
  const int threads = (ceil_div(2 * op.head_dim, 32) + (op.sketch ? 1 : 0)) * 32;
  return threads < kMostThreads ? threads : kMostThreads;
}

/// The new tokens of a row: never more than k and v hold, whatever `lengths` says, or than the cache has room for.
struct Span {
  int first, end;

  __device__ Span(const AppendKv& op, int64_t row) : first(max(0, op.seq_lens[row])) {
    const int tokens = op.lengths ? max(0, min(op.lengths[row], op.tokens)) : op.tokens;
    end = min(first + tokens, op.max_pages * op.page_size);
  }
};

__device__ int page_of(const AppendKv& op, int token) { return token >> (__ffs(op.page_size) - 1); }

/// Copies to the nth page that the row's new tokens touch, summarises it, and codes its new keys. All threads of the
/// block call, thread 0 ... head_threads - 1 for each KV head; one that does not exist is left out.
template <typename T>
__device__ void append_page(const AppendKv& op, int64_t row, const Span& span, int nth, int kv_head, int thread) {
  const bool keys = thread < op.head_dim;
  const int d = keys ? thread : thread - op.head_dim;
  const int page = page_of(op, span.first) + nth, page_begin = page * op.page_size;
  const int start = max(span.first, page_begin), stop = min(span.end, page_begin + op.page_size);
  const bool some = start < stop && kv_head < op.kv_heads, works = some && d < op.head_dim;
  const int64_t physical = some ? op.page_table.row(row)[page] : 0;
  if (works) {
    const Rows &from = keys ? op.k : op.v, &to = keys ? op.k_pages : op.v_pages;
#pragma unroll 1
    for (int token = start; token < stop; ++token) {
      to.at<T>(physical, kv_head, token - page_begin)[d] = from.at<T>(row, token - span.first, kv_head)[d];
    }
  }
  __syncthreads();  // the keys are in their slots
  if (some && op.sketch) {
    dispatch_lanes(op.head_dim, [&](auto lanes) {
      using Coder = KeyCoder<lanes>;
      const Coder coder(op.head_dim, false);
      const int warps = head_threads(op) / 32;
#pragma unroll 1
      for (int first = start + (warps - 1 - thread / 32) * Coder::kKeys; first < stop; first += warps * Coder::kKeys) {
        const int token = first + Coder::nth();
        coder.code(op.sketch, token < stop ? op.k.at<T>(row, token - span.first, kv_head) : nullptr,
                   physical * op.kv_heads + kv_head, op.page_size, token - page_begin);
      }
    });
  }
  if (!works) return;
  if (keys) {
    summarise_bounds<T>(op.k_pages, op.statistics, physical, kv_head, stop - page_begin, d);
  } else {
    summarise_moments<T>(op.k_pages, op.statistics, physical, kv_head, stop - page_begin, d);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads) append_row(AppendKv op) {
  take_turn();
  const int64_t row = blockIdx.y;
  const int width = head_threads(op), heads = blockDim.x / width, head = threadIdx.x / width;
  const int thread = threadIdx.x - head * width, place = blockIdx.x * blockDim.x + threadIdx.x;
  if (place * 32 < op.max_pages) prefetch(op.page_table.row(row) + place * 32);
  const Span span(op, row);
  cluster::arrive();
  const int touched = page_of(op, span.first) < page_of(op, span.end - 1) ? 2 : 1;
#pragma unroll 1
  for (int first = blockIdx.x * heads; first < op.kv_heads; first += gridDim.x * heads) {
#pragma unroll 1
    for (int nth = 0; nth < touched; ++nth) append_page<T>(op, row, span, nth, first + head, thread);
  }
  cluster::wait();  // all have read the old length
  if (place == 0) op.seq_lens[row] = span.end;
}

template <typename T>
__global__ void append_pages(AppendKv op) {
  take_turn();
  const int64_t row = blockIdx.z;
  append_page<T>(op, row, Span(op, row), blockIdx.x, blockIdx.y, threadIdx.x);
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
    const int threads = head_threads(op);
    if (op.tokens <= op.page_size) {
      const int blocks = std::min(cluster::most_blocks(), op.kv_heads);
      const int heads = std::min(ceil_div(op.kv_heads, blocks), kMostThreads / threads);
      launch("append_kv", append_row<T>, {dim3(blocks, op.batch), heads * threads, blocks}, stream, op);
    } else {
      const int pages = (op.tokens - 1) / op.page_size + 2;  // that one row can touch
      launch("append_kv", append_pages<T>, {dim3(pages, op.kv_heads, op.batch), threads}, stream, op);
      launch("append_kv", advance, {dim3(ceil_div(op.batch, 128)), 128}, stream, op);
    }
  });
}

}  // namespace entmaxkv::cuda
