// The support of a head, its tokens with weight, from its near tokens; its tau and number of tokens read; and its
// output, where one block writes it.
#pragma once

#include "near_tokens.cuh"
#include "values.cuh"

namespace entmaxkv::cuda {

/// Global memory of a head.
struct HeadArrays {
  float* weights;  // [list]
  uint32_t* rows;  // [list]
};

constexpr int kOwnValues = 512;     // so many values, or fewer, are left to the block that finds the threshold
constexpr int kEarlyRows = 1024;    // near tokens whose rows are looked up before their threshold is known, at most
constexpr int kUndefinedHead = -1;  // in place of the support of a head whose output is NaN

/// Shared memory with values that one block adds up.
template <typename T>
struct OwnValues {
  static constexpr int kWords = 20 << 6;  // 20 KB
  ValueChunk<T> chunk;
  uint4 values[kWords];  // of near tokens, if all have room
};

/// One (row, query head).
template <typename T>
struct Head {
  const SparseDecode& op;
  const TokenList& list;
  int64_t row;
  int head, kv_head;

  /// Finds the tokens with weight among few near tokens, and replaces the scores and places of near tokens by their
  /// weights and rows in the pool (TokenList::pool_row), in the order of the list. Also writes the head's tau, support
  /// and number of tokens, and if the support is at most `most`, the output. Returns the support, or kUndefinedHead.
  /// All threads of the block call and all get the result.
  __device__ int decode_few(const Entmax<double>& entmax, const NearTokens& near, int most, OwnValues<T>& s_memory,
                            bool vectors) const {
    const int thread = threadIdx.x;
    const int words = op.head_dim * static_cast<int>(sizeof(T)) / 16;  // of a value
    const bool is_early = near.count <= kEarlyRows;
    const bool is_shared = vectors && near.count <= kLeastValues && near.count * words <= s_memory.kWords;
    static_assert(kLeastValues <= kEarlyRows);
    auto* rows = reinterpret_cast<uint32_t*>(near.places);
    if (is_early) look_up_early(near, words, is_shared ? s_memory.values : nullptr);
    const Weights weights = find_weights(entmax, near);
    wait_for_copies<0>();
    auto& s_chunk = s_memory.chunk;
    constexpr int kOwn = 4;  // tokens of a thread, one after the other
    Compaction<3> kept(0);
#pragma unroll 1
    for (int begin = 0; begin < near.count; begin += kOwn * kTeamThreads) {
      const int each = min(kOwn, ceil_div(near.count - begin, kTeamThreads)), first = begin + thread * each;
      float own_weights[kOwn] = {};
      uint32_t own_rows[kOwn];
      int count = 0;
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        if (n >= each || first + n >= near.count) break;
        own_weights[n] = weights.of(near.scores[first + n]);
        own_rows[n] = rows[first + n];
        count += own_weights[n] > 0;
      }
      int to = kept.take(count);  // its barrier orders the reads before the writes
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        if (!(own_weights[n] > 0)) continue;
        near.scores[to] = own_weights[n];
        rows[to] = own_rows[n];
        if (is_shared) {
          s_chunk.weights[0][to] = own_weights[n];
          s_chunk.values[to] = reinterpret_cast<const T*>(s_memory.values + (first + n) * words);
        }
        ++to;
      }
    }
    __syncthreads();
    const int support = write_results(weights.tau, kept.end(), true);
    if (!is_early) {
      look_up(rows, thread, support);
      __syncthreads();
    }
    if (support > most) return support;
    ChunkSums sums;
#pragma unroll 1
    for (int first = 0; first < support; first += kLeastValues) {
      typename ValueChunk<T>::template Own<1> own;
      const int count = min(kLeastValues, support - first);
      if (!is_shared) {
        s_chunk.set_tokens(op, kv_head, rows + first, count);
        s_chunk.set_weights(0, near.scores + first, count);
        __syncthreads();
      }
      s_chunk.add_to(own, op.head_dim, vectors, count);
      sums.add(first / kLeastValues, s_chunk.total(own, 0, op.head_dim, count));
    }
    write_output(support == kUndefinedHead ? kUndefined : sums.total());
    return support;
  }

  /// Finds the tokens with weight among many near tokens, by a team, and writes their weights and rows into global
  /// memory, in the order of the list. Also writes the head's tau, support and number of tokens, and the output if it
  /// is NaN. Returns the support, or kUndefinedHead. All threads of the team call.
  __device__ int list_many(Team& team, const Entmax<double>& entmax, ListScores& scores, const NearScores& near,
                           const HeadArrays& to) const {
    scores.widen_batches();
    const auto of_near_tiles = [&](auto use) { scores.for_each(use); };
    const Weights weights = any_weights(entmax, near.origin, near.start, TeamScores{team, of_near_tiles});
    const float least = weights.least_with_weight(scores.floor, scores.best);
    const auto has_weight = [=](float score) { return score >= least; };
    int own = 0;
    scores.for_each([&](float score) { own += has_weight(score); });
    const Team::Part part = team.part(own);
    scores.compact(part.before, has_weight, [&](const ListScores::Kept& kept) {
      constexpr int kAtOnce = 4;
#pragma unroll 1
      for (int first = threadIdx.x % 32; first < kept.count; first += kAtOnce * 32) {
        int32_t places[kAtOnce];
        uint32_t rows[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) places[n] = kept.place(min(first + n * 32, kept.count - 1));
        list.pool_rows(places, rows);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const int i = first + n * 32;
          if (i >= kept.count) break;
          to.weights[kept.begin + i] = weights.of(kept.scores[i]);
          to.rows[kept.begin + i] = rows[n];
        }
      }
    });
    const int support = write_results(weights.tau, part.total, team.rank == 0);
    if (support == kUndefinedHead && team.rank == 0) write_output(kUndefined);
    return support;
  }

 private:
  /// Replaces the places of near tokens by rows in the pool, and begins to copy their values to s_values, or if that is
  /// null into L2. The first warp does nothing, since it searches for the threshold meanwhile. All threads call.
  __device__ void look_up_early(const NearTokens& near, int words, uint4* s_values) const {
    constexpr int kWarps = kTeamThreads / 32 - 1;
    const int warp = threadIdx.x / 32 - 1, lane = threadIdx.x % 32;
    auto* rows = reinterpret_cast<uint32_t*>(near.places);
    if (warp >= 0) {
#pragma unroll 1
      for (int first = warp; first < near.count; first += 32 * kWarps) {
        if (const int i = first + lane * kWarps; i < near.count) {
          rows[i] = list.pool_row(near.places[i]);
          const auto* value = reinterpret_cast<const char*>(value_of<T>(op, kv_head, rows[i]));
          for (int byte = 0; !s_values && byte < op.head_dim * int{sizeof(T)}; byte += 128) prefetch(value + byte);
        }
        if (!s_values) continue;
        __syncwarp();
        for (int i = first; i < min(first + 32 * kWarps, near.count); i += kWarps) {
          const auto* value = reinterpret_cast<const uint4*>(value_of<T>(op, kv_head, rows[i]));
          for (int word = lane; word < words; word += 32) copy_async(s_values[i * words + word], value + word, true);
        }
      }
    }
    commit_copies();
  }

  /// Replaces places first, first + kTeamThreads, ... of the list by rows in the pool, up to `end`.
  __device__ void look_up(uint32_t* places, int first, int end) const {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int i = first; i < end; i += kAtOnce * kTeamThreads) {
      int32_t some[kAtOnce];
      uint32_t rows[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int own = i + n * kTeamThreads;
        some[n] = static_cast<int32_t>(places[own < end ? own : i]);
      }
      list.pool_rows(some, rows);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (i + n * kTeamThreads < end) places[i + n * kTeamThreads] = rows[n];
      }
    }
  }

  /// Writes a head's tau, support and number of tokens, if this block `writes`. Returns the support, or kUndefinedHead.
  __device__ int write_results(float tau, int support, bool writes) const {
    if (!op.alpha.is_valid(head)) support = 0;
    const bool undefined = support == 0 && list.tokens > 0;  // some score is NaN, or alpha is not valid
    if (writes && threadIdx.x == 0) {
      const int64_t at = row * op.q_heads + head;
      op.tau[at] = undefined ? kUndefined : list.tokens > 0 ? tau : 0;
      op.support[at] = support;
      if (head % op.group == 0) op.tokens[row * op.kv_heads + kv_head] = list.tokens;
    }
    return undefined ? kUndefinedHead : support;
  }

  /// Writes dimension threadIdx.x of the output.
  __device__ void write_output(float value) const {
    if (static_cast<int>(threadIdx.x) < op.head_dim) op.out.at<T>(row, head)[threadIdx.x] = from_float<T>(value);
  }
};

}  // namespace entmaxkv::cuda
