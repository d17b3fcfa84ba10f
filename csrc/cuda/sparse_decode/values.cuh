// The weighted sum of the values of a head's tokens with weight.
//   out[d] = sum_i weight_i v[i, d]
// The tokens, in the order of the list, are cut into chunks at fixed counts. The sum of a chunk, and the order in which
// chunks are added, depend on nothing else: so no other row, no other token and no number of blocks changes a bit.
#pragma once

#include "team.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

static_assert(kTeamThreads >= kMaxHeadDim);

constexpr int kLeastValues = kTeamThreads, kMostValueChunks = 128;  // tokens of a chunk, at least; and chunks, at most

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

/// Tokens whose values a block adds up, in shared memory.
template <typename T>
struct ValueChunk {
  static constexpr int kTokens = kLeastValues;
  static constexpr int kDims = 8;  // dimensions that a thread adds up
  float weights[kTokens];
  const T* values[kTokens];
  float sums[kTeamThreads * kDims];

  /// Sets the first `count` tokens from their weights and their rows in the pool (TokenList::pool_row). All threads
  /// call.
  __device__ void fill(const SparseDecode& op, int kv_head, const float* from_weights, const uint32_t* rows,
                       int count) {
    if (const int i = threadIdx.x; i < count) {
      const uint32_t row = rows[i], slot = row & static_cast<uint32_t>(op.page_size - 1);
      weights[i] = from_weights[i];
      values[i] = op.v_pages.at<T>(row >> log2_of(op.page_size), kv_head, slot);
    }
  }

  /// Returns sum_i weights[i] values[i][d], i < count, for dimension d = threadIdx.x. All threads call, after a barrier
  /// that orders weights and values; before they change there must be another.
  __device__ float sum(int head_dim, bool vectors, int count) {
    const int columns = ceil_div(head_dim, kDims), tokens_at_once = kTeamThreads / columns;
    const int column = threadIdx.x % columns, offset = threadIdx.x / columns;
    float own[kDims] = {};
    if (offset < tokens_at_once) {
      if (vectors) {
        add<true>(own, head_dim, column * kDims, offset, tokens_at_once, count);
      } else {
        add<false>(own, head_dim, column * kDims, offset, tokens_at_once, count);
      }
    }
#pragma unroll
    for (int e = 0; e < kDims; ++e) sums[threadIdx.x * kDims + e] = own[e];
    __syncthreads();
    float total = 0;
    if (static_cast<int>(threadIdx.x) < head_dim) {
      for (int i = 0; i < min(tokens_at_once, count); ++i) total += sums[i * columns * kDims + threadIdx.x];
    }
    return total;
  }

 private:
  /// Adds dimensions d ... d + kDims - 1 of the tokens first, first + step, ... to `own`.
  template <bool kVectors>
  __device__ void add(float (&own)[kDims], int head_dim, int d, int first, int step, int count) const {
    constexpr int kCount = 16 / sizeof(T), kWords = kDims / kCount;
    constexpr int kAtOnce = kVectors ? 8 / kWords : 1;  // tokens in flight
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
        const float weight = weights[i + nth * step];
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          float elements[kCount];
          unpack<T>(words[nth][word], elements);
#pragma unroll
          for (int e = 0; e < kCount; ++e) own[word * kCount + e] += weight * elements[e];
        }
      }
    }
  }
};

}  // namespace entmaxkv::cuda
