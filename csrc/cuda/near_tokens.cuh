// Which tokens of a head can have weight: those whose scores are within beta of the best one (entmax.h).
#pragma once

#include "tile.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

constexpr int kShort = 4096;  // tokens of a list whose scores all fit a block's shared memory
static_assert(kThreads >= kFewTokens && kShort % kThreads == 0);

/// A block's part of a head's near tokens, in the order of the list; all of them in shared memory, if they are few.
struct NearTokens {
  float best;
  int total;  // of all blocks of the team
  int count;  // of this block
  float* scores;
  int32_t* places;

  __device__ bool are_few() const { return total <= kFewTokens; }
};

struct HeldTokens {
  float scores[kFewTokens];
  int32_t places[kFewTokens];
};

/// How far below the best score a token can have weight, rounded up: what is kept in vain gets the weight 0.
__device__ inline float reach_of(const Entmax<double>& entmax) {
  return static_cast<float>(entmax.beta) * (1 + 0x1p-22f);
}

__device__ inline bool is_near(const Entmax<double>& entmax, float score, float best) {
  return score > kNothing && score >= __fsub_rd(best, reach_of(entmax));
}

/// The near tokens of at most kShort with all their scores, by one block. All threads call.
__device__ inline NearTokens near_of_short(Team& block, const Entmax<double>& entmax, int tokens, float* scores,
                                           int32_t* places, HeldTokens& held) {
  constexpr int kOwn = kShort / kThreads;
  const int thread = threadIdx.x;
  float own[kOwn];
  float best = kNothing;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = i * kThreads + thread < tokens ? scores[i * kThreads + thread] : kNothing;
    best = larger(best, own[i]);
  }
  best = block.largest(best);
  bool near[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) near[i] = is_near(entmax, own[i], best);
  const Places<kThreads, kOwn> to(near);
  if (to.count <= kFewTokens) {
    scores = held.scores;
    places = held.places;
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!near[i]) continue;
    scores[to.place[i]] = own[i];
    places[to.place[i]] = i * kThreads + thread;
  }
  __syncthreads();
  return {best, to.count, to.count, scores, places};
}

/// Lists the places, from `first` on, whose bits are set; returns how many. All threads call.
__device__ inline int list_alive(const uint32_t* alive, int tiles, int first, int32_t* places) {
  const int thread = threadIdx.x;
  int count = 0;
  uint32_t next = thread < tiles ? alive[thread] : 0;
  for (int from = 0; from < tiles; from += kThreads) {
    const int tile = from + thread;
    uint32_t mask = next;
    next = tile + kThreads < tiles ? alive[tile + kThreads] : 0;
    int more;
    int to = count + exclusive_scan<kThreads>(__popc(mask), more);
    count += more;
    for (; mask; mask &= mask - 1) places[to++] = first + tile * kTileRows + __ffs(mask) - 1;
  }
  __syncthreads();
  return count;
}

/// The near tokens of those that are alive, by a team; few of them come to its first block. The best score, if it is
/// not known, is kNothing. scores and places are those of the head, of which each block rewrites its part. All threads
/// of the team call.
__device__ inline NearTokens near_of_alive(Team& team, const Entmax<double>& entmax, float best, const uint32_t* alive,
                                           int tiles, float* scores, int32_t* places, HeldTokens& held) {
  const auto begin = static_cast<int>(int64_t{tiles} * team.rank / team.size);
  const auto end = static_cast<int>(int64_t{tiles} * (team.rank + 1) / team.size);
  const int first = begin * kTileRows;
  int32_t* own_places = places + first;
  float* own_scores = scores + first;
  const int living = list_alive(alive + begin, end - begin, first, own_places);
  if (best == kNothing) {
#pragma unroll 4
    for (int i = threadIdx.x; i < living; i += kThreads) best = larger(best, scores[own_places[i]]);
    best = team.largest(best);
  }
  int count = pack(own_scores, own_places, living, [&](int i) {
    const float score = scores[own_places[i]];
    return Entry{is_near(entmax, score, best) ? score : kNothing, own_places[i]};
  });
  Team::Part part = team.part(count);
  if (part.total > kFewTokens && team.size > 1 && !entmax.is_softmax()) {
    // With more tokens the threshold would only rise: a token below that of one block's has no weight.
    Team block = Team::block();
    const Weights own = find_weights(block, entmax, best, {own_scores, count}, count <= kFewTokens);
    const float least = team.largest(static_cast<float>(best + (own.threshold - 1e-6) * entmax.beta));
    count = pack(own_scores, own_places, count,
                 [&](int i) { return Entry{own_scores[i] < least ? kNothing : own_scores[i], own_places[i]}; });
    part = team.part(count);
  }
  if (part.total > kFewTokens) return {best, part.total, count, own_scores, own_places};
  if (static_cast<int>(threadIdx.x) < count) {
    const int to = part.before + static_cast<int>(threadIdx.x);
    cluster::of(0, held.scores[to]) = own_scores[threadIdx.x];
    cluster::of(0, held.places[to]) = own_places[threadIdx.x];
  }
  cluster::sync();
  return {best, part.total, part.total, held.scores, held.places};
}

}  // namespace entmaxkv::cuda
