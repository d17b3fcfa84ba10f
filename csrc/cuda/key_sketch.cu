// key_sketch on the GPU.
//   k_pages [pages, kv_heads, page_size, head_dim] -> codes [pages, kv_heads, 2, page_size, row_bytes],
//   norms [pages, kv_heads, 3, page_size]
// Grid (logical page, KV head, row); a warp codes a key at a time.
#include "kernels.h"
#include "key_sketch.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) code(KeySketch op) {
  take_turn();
  const int64_t row = blockIdx.z;
  const int page = blockIdx.x, kv_head = blockIdx.y;
  const int tokens = min(op.page_size, length_of(op, row) - page * op.page_size);
  if (tokens <= 0) return;
  const int64_t physical = op.page_table.row(row)[page];
#pragma unroll 1
  for (int slot = threadIdx.x / 32; slot < tokens; slot += kThreads / 32) {
    sketch_key(op.sketch, op.k_pages.at<T>(physical, kv_head, slot), op.head_dim, physical * op.kv_heads + kv_head,
               op.page_size, slot);
  }
}

}  // namespace

void key_sketch(const KeySketch& op, cudaStream_t stream) {
  if (op.batch == 0 || op.max_pages == 0) return;
  const dim3 grid(op.max_pages, op.kv_heads, op.batch);
  dispatch_element(op.dtype,
                   [&](auto element) { launch("key_sketch", code<decltype(element)>, {grid, kThreads}, stream, op); });
}

}  // namespace entmaxkv::cuda
