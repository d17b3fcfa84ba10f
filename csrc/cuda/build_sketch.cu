// build_sketch on the GPU, and the sketch of new keys for append_kv.
//   keys -> codes [pages, kv_heads, 2, page_size, row_bytes], norms [pages, kv_heads, 3, page_size] (sketch.h)
// Grid (tokens of a row / kTokens, KV head, row); a warp codes 16 keys at a time, or 8 of more than 128 dimensions.
// Each key is read once, and its codes and norms are written once.
//   1. rotate: the rotated key, from tensor cores.
//   2. code: the step for the key, the code of each coordinate, and the norms of the distances.
//   3. store: the two planes of the codes, and the norms.
#include "build_sketch/key_coder.cuh"
#include "common/new_tokens.cuh"
#include "kernels.h"

namespace entmaxkv::cuda {

namespace {

constexpr int kCodeThreads = 128;
constexpr int kTokens = 256;  // tokens of a block

/// Blocks per multiprocessor that the compiler must leave registers for. Code for newer GPUs needs a few more
/// registers.
template <typename T, int kDims>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kOccupancy = kDims == 64 ? 4 : 2;
#else
constexpr int kOccupancy = kDims == 64      ? 4
                           : sizeof(T) == 2 ? 3
                                            : 2;
#endif

/// Codes this block's part of the tokens begin ... end - 1 of a row. key(token, page) returns the address of a key. All
/// threads call.
template <typename T, int kDims, typename Op, typename Key>
__device__ void code(const Op& op, int64_t row, int begin, int end, bool vectors, Key key) {
  using Coder = KeyCoder<T, kDims>;
  const int kv_head = blockIdx.y, page_bits = log2_of(op.page_size);
  const int32_t* table = op.page_table.row(row);
  begin += static_cast<int>(blockIdx.x) * kTokens;
  end = min(begin + kTokens, end);
  begin += static_cast<int>(threadIdx.x / 32) * Coder::kKeys;
  if (begin >= end) return;
  const Coder coder(op.head_dim, vectors);
#pragma unroll 1
  for (int first = begin; first < end; first += kCodeThreads / 32 * Coder::kKeys) {
    KeyPlace<T> places[Coder::kOfLane];
#pragma unroll
    for (int n = 0; n < Coder::kOfLane; ++n) {
      const int token = first + static_cast<int>(threadIdx.x % 32) / 4 + 8 * n;
      if (token >= end) continue;
      const int64_t page = table[token >> page_bits];
      places[n] = {key(token, page), page * op.kv_heads + kv_head, token & (op.page_size - 1)};
    }
    coder.code(op.sketch, places, op.page_size);
  }
}

template <typename T, int kDims>
__global__ void __launch_bounds__(kCodeThreads, kOccupancy<T, kDims>) code_cache(BuildSketch op, bool vectors) {
  wait_for_previous_kernel();
  const int64_t row = blockIdx.z;
  code<T, kDims>(op, row, 0, length_of(op, row), vectors, [&](int token, int64_t page) {
    return op.k_pages.at<T>(page, blockIdx.y, token & (op.page_size - 1));
  });
}

template <typename T, int kDims>
__global__ void __launch_bounds__(kCodeThreads, kOccupancy<T, kDims>) code_new(AppendKv op, bool vectors) {
  wait_for_previous_kernel();
  const int64_t row = blockIdx.z;
  const NewTokens added(op, row);
  code<T, kDims>(op, row, added.first, added.end, vectors,
                 [&](int token, int64_t) { return op.k.at<T>(row, token - added.first, blockIdx.y); });
}

}  // namespace

void build_sketch(const BuildSketch& op, cudaStream_t stream) {
  if (op.batch == 0 || op.max_pages == 0) return;
  const dim3 grid(ceil_div(op.max_pages * op.page_size, kTokens), op.kv_heads, op.batch);
  const bool vectors = in_vectors(op.k_pages, op.dtype, op.head_dim);
  sketch::dispatch_blocks(op.head_dim, [&](auto blocks) {
    dispatch_element(op.dtype, [&](auto element) {
      constexpr int kDims = blocks * sketch::kBlock;
      launch("build_sketch", code_cache<decltype(element), kDims>, {grid, kCodeThreads}, stream, op, vectors);
    });
  });
}

void sketch_new_keys(const AppendKv& op, cudaStream_t stream) {
  const dim3 grid(ceil_div(op.tokens, kTokens), op.kv_heads, op.batch);
  const bool vectors = in_vectors(op.k, op.dtype, op.head_dim);
  sketch::dispatch_blocks(op.head_dim, [&](auto blocks) {
    dispatch_element(op.dtype, [&](auto element) {
      constexpr int kDims = blocks * sketch::kBlock;
      launch("append_kv", code_new<decltype(element), kDims>, {grid, kCodeThreads}, stream, op, vectors);
    });
  });
}

}  // namespace entmaxkv::cuda
