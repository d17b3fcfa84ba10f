// key_sketch on the GPU, and what append_kv has of it.
//   keys -> codes [pages, kv_heads, 2, page_size, row_bytes], norms [pages, kv_heads, 3, page_size]
// Grid (tokens of a row / kTokens, KV head, row); a warp codes a few keys at a time.
#include "kernels.h"
#include "key_sketch.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kOccupancy = 5;  // blocks that share a multiprocessor
constexpr int kTokens = 256;   // of a block

/// Codes this block's tokens of those from `begin` to `end` of a row; key(token, page) says where a key is.
template <typename Op, typename Key>
__device__ void code(const Op& op, int64_t row, int begin, int end, bool vectors, Key key) {
  const int kv_head = blockIdx.y, page_bits = __ffs(op.page_size) - 1;
  const int32_t* table = op.page_table.row(row);
  begin += static_cast<int>(blockIdx.x) * kTokens;
  end = min(begin + kTokens, end);
  dispatch_lanes(op.head_dim, [&](auto lanes) {
    using Coder = KeyCoder<lanes>;
    const int own = static_cast<int>(threadIdx.x / 32) * Coder::kKeys;
    if (begin + own >= end) return;
    const Coder coder(op.head_dim, vectors);
#pragma unroll 1
    for (int first = begin + own; first < end; first += kThreads / 32 * Coder::kKeys) {
      const int token = first + Coder::nth();
      const int64_t page = token < end ? table[token >> page_bits] : 0;
      coder.code(op.sketch, token < end ? key(token, page) : nullptr, page * op.kv_heads + kv_head, op.page_size,
                 token & (op.page_size - 1));
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kOccupancy) code_cache(KeySketch op, bool vectors) {
  take_turn();
  const int64_t row = blockIdx.z;
  code(op, row, 0, length_of(op, row), vectors, [&](int token, int64_t page) -> const T* {
    return op.k_pages.at<T>(page, blockIdx.y, token & (op.page_size - 1));
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kOccupancy) code_new(AppendKv op, bool vectors) {
  take_turn();
  const int64_t row = blockIdx.z;
  const Span span(op, row);
  code(op, row, span.first, span.end, vectors,
       [&](int token, int64_t) -> const T* { return op.k.at<T>(row, token - span.first, blockIdx.y); });
}

}  // namespace

void key_sketch(const KeySketch& op, cudaStream_t stream) {
  if (op.batch == 0 || op.max_pages == 0) return;
  const dim3 grid(ceil_div(op.max_pages * op.page_size, kTokens), op.kv_heads, op.batch);
  const bool vectors = in_vectors(op.k_pages, op.dtype, op.head_dim);
  dispatch_element(op.dtype, [&](auto element) {
    launch("key_sketch", code_cache<decltype(element)>, {grid, kThreads}, stream, op, vectors);
  });
}

void sketch_new_keys(const AppendKv& op, cudaStream_t stream) {
  const dim3 grid(ceil_div(op.tokens, kTokens), op.kv_heads, op.batch);
  const bool vectors = in_vectors(op.k, op.dtype, op.head_dim);
  dispatch_element(op.dtype, [&](auto element) {
    launch("append_kv", code_new<decltype(element)>, {grid, kThreads}, stream, op, vectors);
  });
}

}  // namespace entmaxkv::cuda
