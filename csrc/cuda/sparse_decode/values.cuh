// The weighted sum of the values of a head's tokens with weight.
//   out[d] = sum_i weight_i v[i, d]
// The tokens, in the order of the list, are cut into chunks at fixed counts. The sum of a chunk, and the order in which
// chunks are added, depend on nothing else: so no other row, token or head and no number of blocks changes a bit.
#pragma once

#include "team.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

static_assert(kTeamThreads >= kMaxHeadDim);

constexpr int kLeastValues = kTeamThreads;  // tokens of a chunk, at least
constexpr int kMostValueChunks = 128;       // chunks of a head, at most

/// Returns the number of tokens of a chunk of a head with `support` tokens with weight.
__host__ __device__ constexpr int value_chunk_size(int support) {
  int size = kLeastValues;
  while (int64_t{size} * kMostValueChunks < support) size *= 2;
  return size;
}

/// Returns the number of chunks of a head, at least 1.
__host__ __device__ constexpr int value_chunks_of(int support) {
  return support <= kLeastValues ? 1 : ceil_div(support, value_chunk_size(support));
}

/// Returns the value with a row in the pool (TokenList::pool_row).
template <typename T>
__device__ const T* value_of(const SparseDecode& op, int kv_head, uint32_t pool_row) {
  const uint32_t slot = pool_row & static_cast<uint32_t>(op.page_size - 1);
  return op.v_pages.at<T>(pool_row >> log2_of(op.page_size), kv_head, slot);
}

/// Tokens whose values a block adds up for up to kMostHeads heads, in shared memory.
template <typename T, int kMostHeads = 1>
struct ValueChunk {
  static constexpr int kTokens = kLeastValues;
  static constexpr int kDims = 8;  // dimensions that a thread adds up
  float weights[kMostHeads][kTokens];
  const T* values[kTokens];
  float sums[kTeamThreads * kDims];

  /// Sets the first `count` tokens from their rows in the pool (TokenList::pool_row). All threads call.
  __device__ void set_tokens(const SparseDecode& op, int kv_head, const uint32_t* rows, int count) {
    if (const int i = threadIdx.x; i < count) values[i] = value_of<T>(op, kv_head, rows[i]);
  }

  /// Sets the weights of the first `count` tokens for the nth head. All threads call.
  __device__ void set_weights(int nth, const float* from, int count) {
    if (const int i = threadIdx.x; i < count) weights[nth][i] = from[i];
  }

  /// Adds sum_i weights[h][i] values[i][d], i < count, for dimension d = threadIdx.x to totals[h]. A head's sum does
  /// not depend on kHeads. All threads call, after a barrier that orders weights and values; before they change there
  /// must be another.
  template <int kHeads>
  __device__ void add_to(float (&totals)[kHeads], int head_dim, bool vectors, int count) {
    static_assert(kHeads <= kMostHeads);
    const int columns = ceil_div(head_dim, kDims), tokens_at_once = kTeamThreads / columns;
    const int column = threadIdx.x % columns, offset = threadIdx.x / columns;
    float own[kHeads][kDims] = {};
    if (offset < tokens_at_once) {
      if (vectors) {
        add<true>(own, head_dim, column * kDims, offset, tokens_at_once, count);
      } else {
        add<false>(own, head_dim, column * kDims, offset, tokens_at_once, count);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h > 0) __syncthreads();  // the sums of the last head have been read
#pragma unroll
      for (int e = 0; e < kDims; ++e) sums[threadIdx.x * kDims + e] = own[h][e];
      __syncthreads();
      if (static_cast<int>(threadIdx.x) >= head_dim) continue;
      float total = 0;
      for (int i = 0; i < min(tokens_at_once, count); ++i) total += sums[i * columns * kDims + threadIdx.x];
      totals[h] += total;
    }
  }

 private:
  /// Adds dimensions d ... d + kDims - 1 of the tokens first, first + step, ... to `own`.
  template <bool kVectors, int kHeads>
  __device__ void add(float (&own)[kHeads][kDims], int head_dim, int d, int first, int step, int count) const {
    constexpr int kCount = 16 / sizeof(T), kWords = kDims / kCount;
    constexpr int kAtOnce = !kVectors ? 1 : (kHeads > 1 ? 4 : 8) / kWords;  // tokens in flight
#pragma unroll 1
    for (int i = first; i < count; i += kAtOnce * step) {
      uint4 words[kAtOnce][kWords];
#pragma unroll
      for (int nth = 0; nth < kAtOnce; ++nth) {
        const T* value = values[min(i + nth * step, count - 1)];
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          words[nth][word] = load_word<kVectors>(value, d + word * kCount, head_dim);
        }
      }
#pragma unroll
      for (int nth = 0; nth < kAtOnce; ++nth) {
        if (i + nth * step >= count) break;
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          float elements[kCount];
          unpack<T>(words[nth][word], elements);
#pragma unroll
          for (int h = 0; h < kHeads; ++h) {
            const float weight = weights[h][i + nth * step];
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
              float& sum = own[h][word * kCount + e];
              sum = fmaf(weight, elements[e], sum);
            }
          }
        }
      }
    }
  }
};

}  // namespace entmaxkv::cuda
