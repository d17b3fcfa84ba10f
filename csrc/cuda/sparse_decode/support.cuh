// The support of a head, its tokens with weight, from its near tokens; and its tau and number of tokens read.
#pragma once

#include "near_tokens.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

/// Stream compaction of many near tokens: calls write(to, i, score) for those with keep(score). Returns their number.
/// All threads of the team call and all get the result.
template <typename Keep, typename Write>
__device__ int compact_many(Team& team, const NearTokens& near, Keep keep, Write write) {
  constexpr int kAtOnce = 8;
  const WarpRun run = WarpRun::of_block(first_of_part(near.count, team.rank * team.own_parts()),
                                        first_of_part(near.count, (team.rank + 1) * team.own_parts()));
  const auto read = [&](int i) { return near.scores[i]; };
  const Kept kept = Kept::of<kAtOnce>(run, read, keep);
  const Team::Part part = team.part(kept.all);
  compact<kAtOnce>(run, part.before + kept.before, read, keep, write);
  return part.total;
}

constexpr int kUndefinedHead = -1;  // in place of the support of a head whose output is NaN

/// One (row, query head).
struct Head {
  const SparseDecode& op;
  const TokenList& list;
  int64_t row;
  int head, kv_head;

  /// Finds the tokens with weight. Calls write(to, weight, row) with to = 0, 1, ... for each, in the order of the list;
  /// row is TokenList::pool_row. Also writes the head's tau, support and number of tokens. Returns the support, or
  /// kUndefinedHead. All threads of the team call and all get the result. If near.few(), the team must be this
  /// block, and near.places then holds rows instead of places. No barrier follows the last write.
  template <typename Write>
  __device__ int find_support(Team& team, const Entmax<double>& entmax, const NearTokens& near, Write write) const {
    const int thread = threadIdx.x;
    // One block turns places into rows before they are needed: the search for the threshold overlaps the first
    // look-ups.
    uint32_t pool_row = 0;
    if (near.few() && thread < near.count) pool_row = list.pool_row(near.places[thread]);
    const Weights weights = find_weights(team, entmax, near);
    if (near.few() && thread < near.count) near.places[thread] = static_cast<int32_t>(pool_row);
#pragma unroll 1
    for (int i = thread + kTeamThreads; near.few() && i < near.count; i += kTeamThreads) {
      near.places[i] = static_cast<int32_t>(list.pool_row(near.places[i]));
    }
    // The barriers of Kept::of are between these writes and the reads.
    const auto has_weight = [&](float score) { return weights.of(score) > 0; };
    int support;
    if (near.few()) {
      const WarpRun run = WarpRun::of_block(0, near.count);
      const auto read = [&](int i) { return near.scores[i]; };
      const Kept kept = Kept::of<1>(run, read, has_weight);
      compact<1>(run, kept.before, read, has_weight, [&](int to, int i, float score) {
        write(to, weights.of(score), static_cast<uint32_t>(near.places[i]));
      });
      support = kept.all;
    } else {
      support = compact_many(team, near, has_weight, [&](int to, int i, float score) {
        write(to, weights.of(score), list.pool_row(near.places[i]));
      });
    }
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
};

}  // namespace entmaxkv::cuda
