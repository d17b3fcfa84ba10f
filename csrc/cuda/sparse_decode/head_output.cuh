// The output of a head from its near tokens: threshold, weights, and the sum of the values of the tokens with p > 0.
#pragma once

#include "near_tokens.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

static_assert(kTeamThreads >= kMaxHeadDim);

/// Tokens whose values a block adds up together, in shared memory.
template <typename T>
struct Chunk {
  static constexpr int kTokens = kFewTokens;
  static constexpr int kDims = 8;  // dimensions that a thread adds up
  float weights[kTokens];
  const T* values[kTokens];
  float sums[kTeamThreads * kDims];

  /// Sets the first `count` tokens from their weights and places. All threads call; a barrier follows.
  __device__ void fill(const Rows& v_pages, const TokenList& list, int kv_head, const float* from_weights,
                       const int32_t* places, int count) {
    __syncthreads();  // the tokens of an earlier call have been read
    for (int i = threadIdx.x; i < count; i += kTeamThreads) {
      weights[i] = from_weights[i];
      values[i] = list.row<T>(v_pages, kv_head, places[i]);
    }
    __syncthreads();
  }

  /// Returns sum_i weights[i] values[i][d], i < count, for dimension d = threadIdx.x. All threads call. Between two
  /// calls there must be a barrier; fill has one.
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
    constexpr int kAtOnce = kVectors ? 4 : 1;  // tokens in flight
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

/// Computes and writes the output, tau and support of one (row, query head).
template <typename T>
struct HeadOutput {
  const SparseDecode& op;
  const TokenList& list;
  int64_t row;
  int head, kv_head;
  bool vectors;  // whether values can be read 16 bytes at a time

  /// Writes the output from the head's near tokens. If they are few, all threads of one block call, else all threads of
  /// the team.
  __device__ void write(Team& team, const Entmax<double>& entmax, NearTokens near, NearMemory& memory,
                        Chunk<T>& s_chunk) const {
    const bool few = near.are_few();
    const auto value_of = [&](int i) {
      return i < near.count ? list.row<T>(op.v_pages, kv_head, near.places[i]) : nullptr;
    };
    const T* value = few ? value_of(threadIdx.x) : nullptr;  // the first load overlaps the search for the threshold
    const Weights weights =
        find_weights(team, entmax, {near.scores, near.count, near.origin, near.parts, memory.many.ends}, few);
    float total = 0;
    int support = 0;
    if (few) {
#pragma unroll 1
      for (int first = 0; first < near.count; first += kTeamThreads) {
        const int i = first + static_cast<int>(threadIdx.x);
        if (first > 0) value = value_of(i);
        const float weight = value ? weights.of(near.scores[i]) : 0;
        const bool counts[] = {weight > 0};
        const Places<kTeamThreads, 1> to(counts);
        if (counts[0]) {
          s_chunk.weights[support + to.place[0]] = weight;
          s_chunk.values[support + to.place[0]] = value;
        }
        support += to.count;
      }
      __syncthreads();
      total = s_chunk.sum(op.head_dim, vectors, support);
    } else {
      near.count = pack(
          near.count,
          [&](int i) {
            const float weight = weights.of(near.scores[i]);
            return Entry{weight > 0 ? weight : kNothing, near.places[i]};
          },
          [&](int to, const Entry& entry) {
            near.scores[to] = entry.value;
            near.places[to] = entry.place;
          });
      near.divide(team, list.tiles(), memory.many);
      int first = 0;
      for (int nth = 0; nth < near.parts; ++nth) {
        const int part = team.rank * near.parts + nth, end = memory.many.ends[nth];
        if (threadIdx.x == 0) team.of(0, memory.many.counts[part]) = end - first;
        float sum = 0;
        for (; first < end; first += kChunk) {
          const int some = min(kChunk, end - first);
          s_chunk.fill(op.v_pages, list, kv_head, near.scores + first, near.places + first, some);
          sum += s_chunk.sum(op.head_dim, vectors, some);
        }
        first = end;
        team.of(0, memory.many.sums[part][threadIdx.x]) = sum;
      }
      team.sync();
      if (team.rank > 0) return;
      for (int part = 0; part < team.size * near.parts; ++part) {
        support += memory.many.counts[part];
        total += memory.many.sums[part][threadIdx.x];
      }
    }
    if (!op.alpha.is_valid(head)) support = 0;
    const bool undefined = support == 0 && list.tokens > 0;  // some score is NaN, or alpha is not valid
    const int64_t at = row * op.q_heads + head;
    if (threadIdx.x == 0) {
      op.tau[at] = undefined ? kUndefined : list.tokens > 0 ? weights.tau : 0;
      op.support[at] = support;
      if (head % op.group == 0) op.tokens[row * op.kv_heads + kv_head] = list.tokens;
    }
    if (undefined) total = kUndefined;
    if (static_cast<int>(threadIdx.x) < op.head_dim) op.out.at<T>(row, head)[threadIdx.x] = from_float<T>(total);
  }

 private:
  static constexpr int kChunk = Chunk<T>::kTokens;
};

}  // namespace entmaxkv::cuda
