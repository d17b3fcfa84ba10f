// Which tokens of a head can have weight: those whose scores are within beta of the best one (entmax.h). By one block.
#pragma once

#include "tile.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

constexpr int kHeldTokens = 512;
constexpr int kShort = 8 * kHeldTokens;  // tokens of a list that needs no bits of what is alive
static_assert(kThreads >= kHeldTokens && kShort % kThreads == 0);

/// Lists the places of the tokens that are alive, in their order; returns how many. All threads call.
__device__ inline int list_alive(const uint32_t* alive, int tiles, int32_t* places) {
  int count = 0;
  for (int first = 0; first < tiles; first += kThreads * kRun) {
    uint32_t masks[kRun];
    int own = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int tile = first + static_cast<int>(threadIdx.x) * kRun + i;
      masks[i] = tile < tiles ? alive[tile] : 0;
      own += __popc(masks[i]);
    }
    int more;
    int to = count + exclusive_scan<kThreads>(own, more);
    count += more;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int tile = first + static_cast<int>(threadIdx.x) * kRun + i;
      for (uint32_t mask = masks[i]; mask; mask &= mask - 1) places[to++] = tile * kTileRows + __ffs(mask) - 1;
    }
  }
  __syncthreads();
  return count;
}

/// A head's tokens within beta of its best score, in the order of the list: up to kHeldTokens of them in shared memory.
struct NearTokens {
  float best;
  int count;
  float* scores;
  int32_t* places;
};

struct HeldTokens {
  float scores[kHeldTokens];
  int32_t places[kHeldTokens];
};

__device__ inline bool is_near(const Entmax<double>& entmax, float score, float best) {
  return static_cast<double>(score) - best > -entmax.beta;
}

/// The near tokens of at most kShort with all their scores. All threads call.
__device__ inline NearTokens near_of_short(const Entmax<double>& entmax, int tokens, float* scores, int32_t* places,
                                           HeldTokens& held) {
  constexpr int kOwn = kShort / kThreads;
  const int thread = threadIdx.x;
  float own[kOwn];
  float best = kNothing;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = i * kThreads + thread < tokens ? scores[i * kThreads + thread] : kNothing;
    best = larger(best, own[i]);
  }
  best = largest<kThreads>(best);
  bool near[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) near[i] = is_near(entmax, own[i], best);
  const Places<kThreads, kOwn> to(near);
  if (to.count <= kHeldTokens) {
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
  return {best, to.count, scores, places};
}

/// The near tokens of those that are alive. All threads call.
__device__ inline NearTokens near_of_alive(const Entmax<double>& entmax, float best, const uint32_t* alive, int tiles,
                                           float* scores, int32_t* places, HeldTokens& held) {
  const int count = pack(scores, places, list_alive(alive, tiles, places), [&](int i) {
    const float score = scores[places[i]];
    return Entry{is_near(entmax, score, best) ? score : kNothing, places[i]};
  });
  if (count > kHeldTokens) return {best, count, scores, places};
  if (threadIdx.x < count) {
    held.scores[threadIdx.x] = scores[threadIdx.x];
    held.places[threadIdx.x] = places[threadIdx.x];
  }
  __syncthreads();
  return {best, count, held.scores, held.places};
}

}  // namespace entmaxkv::cuda
