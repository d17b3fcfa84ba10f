// key_sketch on the GPU.
//   k_pages [pages, kv_heads, page_size, head_dim] -> codes [pages, kv_heads, 2, page_size, row_bytes],
//   norms [pages, kv_heads, 3, page_size]
// Grid (tokens of a row / kTokens, KV head, row); a warp codes a few keys at a time.
#include "kernels.h"
#include "key_sketch.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 256;  // of a block

template <typename T>
__global__ void __launch_bounds__(kThreads, 6) code(KeySketch op, bool vectors) {
  take_turn();
  const int64_t row = blockIdx.z;
  const int kv_head = blockIdx.y, begin = static_cast<int>(blockIdx.x) * kTokens;
  const int end = min(begin + kTokens, length_of(op, row)), page_bits = __ffs(op.page_size) - 1;
  const int32_t* table = op.page_table.row(row);
  dispatch_lanes(op.head_dim, [&](auto lanes) {
    using Coder = KeyCoder<lanes>;
    const Coder coder(op.head_dim, vectors);
    constexpr int kStep = kThreads / 32 * Coder::kKeys;
#pragma unroll 1
    for (int first = begin + static_cast<int>(threadIdx.x / 32) * Coder::kKeys; first < end; first += kStep) {
      const int token = first + Coder::nth(), slot = token & (op.page_size - 1);
      const int64_t physical = token < end ? table[token >> page_bits] : 0;
      coder.code(op.sketch, token < end ? op.k_pages.at<T>(physical, kv_head, slot) : nullptr,
                 physical * op.kv_heads + kv_head, op.page_size, slot);
    }
  });
}

}  // namespace

void key_sketch(const KeySketch& op, cudaStream_t stream) {
  if (op.batch == 0 || op.max_pages == 0) return;
  const dim3 grid(ceil_div(op.max_pages * op.page_size, kTokens), op.kv_heads, op.batch);
  const bool vectors = in_vectors(op.k_pages, op.dtype, op.head_dim);
  dispatch_element(op.dtype, [&](auto element) {
    launch("key_sketch", code<decltype(element)>, {grid, kThreads}, stream, op, vectors);
  });
}

}  // namespace entmaxkv::cuda
