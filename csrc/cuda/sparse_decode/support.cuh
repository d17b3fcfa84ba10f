// The support of a head, its tokens with weight, from its near tokens; its tau and number of tokens read; and its
// output, where one block writes it.
#pragma once

#include "near_tokens.cuh"
#include "values.cuh"

namespace entmaxkv::cuda {

/// The tokens of a head that a block has listed: begin ... end - 1 of `all`.
struct Listed {
  int begin, end, all;
};

/// Stream compaction of many near tokens: calls write(to, i, score) for those with keep(score). All threads of the team
/// call.
template <typename Keep, typename Write>
__device__ Listed compact_many(Team& team, const NearTokens& near, Keep keep, Write write) {
  constexpr int kAtOnce = 8;
  const WarpRun run = WarpRun::of_block(first_of_part(near.count, team.rank * team.own_parts()),
                                        first_of_part(near.count, (team.rank + 1) * team.own_parts()));
  const auto read = [&](int i) { return near.scores[i]; };
  const Kept kept = Kept::of<kAtOnce>(run, read, keep);
  const Team::Part part = team.part(kept.all);
  compact<kAtOnce>(run, part.before + kept.before, read, keep, write);
  return {part.before, part.before + kept.all, part.total};
}

constexpr int kOwnValues = 512;     // so many values, or fewer, are left to the block that finds the threshold
constexpr int kEarlyRows = 1024;    // near tokens whose rows are looked up before their threshold is known, at most
constexpr int kUndefinedHead = -1;  // in place of the support of a head whose output is NaN

/// One (row, query head).
template <typename T>
struct Head {
  const SparseDecode& op;
  const TokenList& list;
  int64_t row;
  int head, kv_head;

  /// Finds the tokens with weight, and writes their weights and their rows in the pool (TokenList::pool_row) in the
  /// order of the list. Also writes the head's tau, support and number of tokens. Returns the support, or
  /// kUndefinedHead. All threads of the team call and all get the result. If near.few(), the team must be this block.
  /// near.places may then hold rows instead of places. No barrier follows the last write.
  __device__ int find_support(Team& team, const Entmax<double>& entmax, const NearTokens& near, float* to_weights,
                              uint32_t* to_rows) const {
    const int thread = threadIdx.x;
    // Where near tokens are few, their rows are looked up first, and their values begin to come into L2. The last
    // threads begin: the first warp searches for the threshold alone.
    const bool early = near.count <= kEarlyRows;
    if (early) {
      look_up(reinterpret_cast<uint32_t*>(near.places), kTeamThreads - 1 - thread, near.count, [&](uint32_t row) {
        const auto* value = reinterpret_cast<const char*>(value_of<T>(op, kv_head, row));
        for (int byte = 0; byte < op.head_dim * int{sizeof(T)}; byte += 128) prefetch(value + byte);
      });
    }
    const Weights weights = find_weights(team, entmax, near);
    // The barriers of Kept::of are between the writes of rows and the reads.
    const auto has_weight = [&](float score) { return weights.of(score) > 0; };
    const auto write = [&](int to, int i, float score) {
      to_weights[to] = weights.of(score);
      to_rows[to] = static_cast<uint32_t>(near.places[i]);
    };
    Listed listed;
    if (near.few()) {
      const WarpRun run = WarpRun::of_block(0, near.count);
      const auto read = [&](int i) { return near.scores[i]; };
      const Kept kept = Kept::of<1>(run, read, has_weight);
      compact<1>(run, kept.before, read, has_weight, write);
      listed = {0, kept.all, kept.all};
    } else {
      listed = compact_many(team, near, has_weight, write);
    }
    if (!early) {
      __syncthreads();  // all threads have written places
      look_up(to_rows, listed.begin + thread, listed.end, [](uint32_t) {});
    }
    int support = listed.all;
    if (!op.alpha.is_valid(head)) support = 0;
    const bool undefined = support == 0 && list.tokens > 0;  // some score is NaN, or alpha is not valid
    if (team.rank == 0 && thread == 0) {
      const int64_t at = row * op.q_heads + head;
      op.tau[at] = undefined ? kUndefined : list.tokens > 0 ? weights.tau : 0;
      op.support[at] = support;
      if (head % op.group == 0) op.tokens[row * op.kv_heads + kv_head] = list.tokens;
    }
    return undefined ? kUndefinedHead : support;
  }

  /// Adds up the values of the tokens with weight and writes the output. `support`, weights and rows are what
  /// find_support returned and wrote. All threads of one block call.
  __device__ void write_output(int support, const float* weights, const uint32_t* rows, ValueChunk<T>& s_chunk,
                               bool vectors) const {
    float sum[1] = {};
#pragma unroll 1
    for (int from = 0; from < support; from += kLeastValues) {
      const int count = min(kLeastValues, support - from);
      __syncthreads();  // the tokens before these have been read
      s_chunk.set_tokens(op, kv_head, rows + from, count);
      s_chunk.set_weights(0, weights + from, count);
      __syncthreads();
      s_chunk.add_to(sum, op.head_dim, vectors, count);
    }
    if (static_cast<int>(threadIdx.x) < op.head_dim) {
      op.out.at<T>(row, head)[threadIdx.x] = from_float<T>(support == kUndefinedHead ? kUndefined : sum[0]);
    }
  }

 private:
  /// Replaces places first, first + kTeamThreads, ... of the list by rows in the pool, up to `end`. Calls use(row).
  template <typename Use>
  __device__ void look_up(uint32_t* places, int first, int end, Use use) const {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int i = first; i < end; i += kAtOnce * kTeamThreads) {
      uint32_t rows[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int own = i + n * kTeamThreads;
        rows[n] = list.pool_row(static_cast<int>(places[own < end ? own : i]));
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (i + n * kTeamThreads >= end) break;
        places[i + n * kTeamThreads] = rows[n];
        use(rows[n]);
      }
    }
  }
};

}  // namespace entmaxkv::cuda
