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
constexpr int kMostValueChunks = 512;       // chunks of a head, at most

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

/// The sum over the chunks of a head, one dimension: in kGroups sums, of chunks i, i + kGroups, ..., which are added up
/// at the end.
struct ChunkSums {
  static constexpr int kGroups = 4;
  float groups[kGroups] = {};

  __device__ void add(int chunk, float sum) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) groups[group] += chunk % kGroups == group ? sum : 0;
  }

  __device__ float total() const {
    float total = 0;
#pragma unroll
    for (const float sum : groups) total += sum;
    return total;
  }
};

/// Adds up the sums [chunks, dims] of a head's chunks as ChunkSums does; dims is a multiple of 4. s_sums has room for
/// four numbers of each thread. Thread d gets dimension d of the total. All threads of the block call.
__device__ inline float total_of_chunks(const float* sums, int chunks, int dims, float* s_sums) {
  constexpr int kAtOnce = 16;
  static_assert(ChunkSums::kGroups * kMaxHeadDim <= 4 * kTeamThreads);
  const int columns = dims / 4, column = threadIdx.x % columns, group = threadIdx.x / columns;
  const bool adds = group < ChunkSums::kGroups;
  float4 own{0, 0, 0, 0};
#pragma unroll 1
  for (int begin = group; begin < chunks && adds; begin += kAtOnce * ChunkSums::kGroups) {
    float4 some[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int chunk = begin + n * ChunkSums::kGroups;
      some[n] = {0, 0, 0, 0};
      if (chunk < chunks) some[n] = __ldcg(reinterpret_cast<const float4*>(sums + int64_t{chunk} * dims) + column);
    }
#pragma unroll
    for (const float4& sum : some) own = {own.x + sum.x, own.y + sum.y, own.z + sum.z, own.w + sum.w};
  }
  __syncthreads();  // s_sums has been read
  if (adds) reinterpret_cast<float4*>(s_sums)[threadIdx.x] = own;
  __syncthreads();
  ChunkSums all;
  if (static_cast<int>(threadIdx.x) < dims) {
#pragma unroll
    for (int n = 0; n < ChunkSums::kGroups; ++n) all.groups[n] = s_sums[n * dims + threadIdx.x];
  }
  return all.total();
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
  alignas(16) float sums[kTeamThreads * kDims];

  /// Sets the first `count` tokens from their rows in the pool (TokenList::pool_row). All threads call.
  __device__ void set_tokens(const SparseDecode& op, int kv_head, const uint32_t* rows, int count) {
    if (const int i = threadIdx.x; i < count) values[i] = value_of<T>(op, kv_head, rows[i]);
  }

  /// Sets the weights of the first `count` tokens for the nth head. All threads call.
  __device__ void set_weights(int nth, const float* from, int count) {
    if (const int i = threadIdx.x; i < count) weights[nth][i] = from[i];
  }

  /// What a thread has added up: for each head, kDims dimensions of every nth token.
  template <int kHeads>
  struct Own {
    float sums[kHeads][kDims] = {};
  };

  /// Adds weights[h][i] values[i][d], i < count, to what the threads have added up. All threads call, after a barrier
  /// that orders weights and values; before they change there must be another.
  template <int kHeads>
  __device__ void add_to(Own<kHeads>& own, int head_dim, bool vectors, int count) const {
    static_assert(kHeads <= kMostHeads);
    const Columns at(head_dim);
    if (at.offset >= at.tokens) return;
    if (vectors) {
      add<true>(own.sums, head_dim, at.column * kDims, at.offset, at.tokens, count);
    } else {
      add<false>(own.sums, head_dim, at.column * kDims, at.offset, at.tokens, count);
    }
  }

  /// Returns for dimension d = threadIdx.x what all threads have added up for the nth head, from up to `count` tokens
  /// at a time. The sum does not depend on kHeads. All threads call.
  template <int kHeads>
  __device__ float total(const Own<kHeads>& own, int nth, int head_dim, int count) {
    const Columns at(head_dim);
    __syncthreads();  // the last sums have been read
#pragma unroll
    for (int e = 0; e < kDims; ++e) sums[threadIdx.x * kDims + e] = own.sums[nth][e];
    __syncthreads();
    float total = 0;
    if (static_cast<int>(threadIdx.x) < head_dim) {
#pragma unroll 4
      for (int i = 0; i < min(at.tokens, count); ++i) total += sums[i * at.columns * kDims + threadIdx.x];
    }
    return total;
  }

 private:
  /// How threads divide tokens and dimensions.
  struct Columns {
    int columns, tokens;  // `tokens` tokens are added at once
    int column, offset;   // this thread's

    __device__ explicit Columns(int head_dim)
        : columns(ceil_div(head_dim, kDims)),
          tokens(kTeamThreads / columns),
          column(threadIdx.x % columns),
          offset(threadIdx.x / columns) {}
  };

  /// Does what load_word does. The values of a single head may lie in shared memory, too.
  template <bool kVectors>
  static __device__ uint4 load(const T* value, int d, int head_dim) {
    if constexpr (kVectors && kMostHeads == 1) {
      return d < head_dim ? *reinterpret_cast<const uint4*>(value + d) : uint4{0, 0, 0, 0};
    } else {
      return load_word<kVectors>(value, d, head_dim);
    }
  }

  /// Adds dimensions d ... d + kDims - 1 of the tokens first, first + step, ... to `own`.
  template <bool kVectors, int kHeads>
  __device__ void add(float (&own)[kHeads][kDims], int head_dim, int d, int first, int step, int count) const {
    constexpr int kCount = 16 / sizeof(T), kWords = kDims / kCount;
    constexpr int kAtOnce = !kVectors ? 1 : 8 / kWords;  // tokens in flight
#pragma unroll 1
    for (int i = first; i < count; i += kAtOnce * step) {
      uint4 words[kAtOnce][kWords];
#pragma unroll
      for (int nth = 0; nth < kAtOnce; ++nth) {
        const T* value = values[min(i + nth * step, count - 1)];
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          words[nth][word] = load<kVectors>(value, d + word * kCount, head_dim);
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
