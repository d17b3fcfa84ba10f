// Which tokens of a head can have weight: those whose scores are within beta of the best one (entmax.h).
#pragma once

#include "../common/ring.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

constexpr int kShort = 4096;  // tokens of a list whose scores all fit a block's shared memory
static_assert(kShort % kTeamThreads == 0);

/// Parts that a list is divided in where many of its tokens are near: by its length alone.
constexpr int kOnePart = 8 << 10, kFourParts = 128 << 10;  // tokens of the longest lists in so many

__host__ __device__ constexpr int parts_of(int64_t tokens) {
  return tokens <= kOnePart ? 1 : tokens <= kFourParts ? 4 : kMostParts;
}

/// The first tile of a part, or of a block's.
__device__ inline int first_tile(int tiles, int part, int parts) {
  return static_cast<int>(int64_t{tiles} * part / parts);
}

struct FewTokens {
  float scores[kFewTokens];
  int32_t places[kFewTokens];
};

struct ManyTokens {
  int ends[kMostParts];                  // of the block's parts, among its tokens
  float sums[kMostParts][kTeamThreads];  // of the first block: what the parts add up to
  int counts[kMostParts];                // and their tokens
};

/// What a block needs for near tokens.
union NearMemory {
  FewTokens few;
  ManyTokens many;
};

/// A block's part of a head's near tokens, in the order of the list; all of them in shared memory, if they are few.
struct NearTokens {
  float origin;  // Candidates
  int total;     // of all blocks of the team
  int count;     // of this block
  float* scores;
  int32_t* places;
  int parts = 1;

  __device__ bool are_few() const { return total <= kFewTokens; }

  /// Finds where the parts of a list of so many tiles end among the tokens of this block. All threads of the team call.
  __device__ void divide(const Team& team, int tiles, ManyTokens& memory) {
    parts = parts_of(int64_t{tiles} * kTileRows) / team.size;
    const int nth = threadIdx.x;
    if (nth < parts) {
      const int limit = first_tile(tiles, team.rank * parts + nth + 1, team.size * parts);
      int below = 0, end = count;
      while (below < end) {
        const int middle = (below + end) / 2;
        if (places[middle] / kTileRows < limit) {
          below = middle + 1;
        } else {
          end = middle;
        }
      }
      memory.ends[nth] = below;
    }
    __syncthreads();
  }
};

/// How far below the best score a token can have weight, rounded up: what is kept in vain gets the weight 0.
__device__ inline float reach_of(const Entmax<double>& entmax) {
  return static_cast<float>(entmax.beta) * (1 + 0x1p-22f);
}

/// Levels below the best score, kLevels to the last one where a token can have weight. A head's threshold is at least
/// the first level where the tokens above it, each taken to be at the level below its own score, have a mass of 1; and
/// above it by less than two levels and what kEnough adds. With more tokens a threshold only rises.
class Levels {
 public:
  static constexpr int kLevels = 32;              // a lane's each
  static constexpr float kStep = 1.0f / kLevels;  // of beta

  /// All threads call, and then __syncthreads.
  __device__ explicit Levels(const Entmax<double>& entmax)
      : counts_(counts()), entmax_(entmax), per_level_(static_cast<float>(kLevels * entmax.gap)) {
    if (threadIdx.x < kLevels) counts_[threadIdx.x] = 0;
  }

  /// Takes a token into account.
  __device__ void count(float best, float score) const {
    const float below = (best - score) * per_level_;
    if (below < kLevels && per_level_ > 0) atomicAdd(&counts_[static_cast<int>(fmaxf(below, 0))], 1);
  }

  /// The score of the level, of all blocks' tokens. All threads of the team call.
  __device__ float least(Team& team, float best) const {
    constexpr float kEnough = 1 + 1e-4f;  // mass, rounding included
    __shared__ float s_weights[2 * kLevels], s_least;
    const int lane = threadIdx.x;
    if (lane < kLevels) {
      s_weights[lane] = 0;
      s_weights[kLevels + lane] = power(lane * kStep, static_cast<float>(entmax_.beta));
    }
    team.sync();
    if (lane < kLevels) {
      const int own = team.sum_of(counts_[lane]);
      float mass = 0;
#pragma unroll 8
      for (int level = 0; level < kLevels; ++level) {
        mass += static_cast<float>(__shfl_sync(kAllLanes, own, level)) * s_weights[kLevels + lane - level];
      }
      const uint32_t enough = __ballot_sync(kAllLanes, mass >= kEnough);
      const int level = enough ? __ffs(enough) : kLevels;
      if (lane == 0) s_least = __fsub_rd(best, static_cast<float>(level * kStep * entmax_.beta));
    }
    __syncthreads();
    return entmax_.is_softmax() ? kNothing : s_least;
  }

 private:
  static __device__ int* counts() {
    __shared__ int s_counts[kLevels];
    return s_counts;
  }

  int* counts_;
  const Entmax<double>& entmax_;
  float per_level_;
};

/// The near tokens of at most kShort with all their scores, by one block. All threads call.
__device__ inline NearTokens near_of_short(Team& block, const Entmax<double>& entmax, int tokens, float* scores,
                                           int32_t* places, FewTokens& few) {
  constexpr int kOwn = kShort / kTeamThreads;
  const int thread = threadIdx.x;
  const Levels levels(entmax);
  float own[kOwn];
  float best = kNothing;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = i * kTeamThreads + thread < tokens ? scores[i * kTeamThreads + thread] : kNothing;
    best = larger(best, own[i]);
  }
  best = block.largest(best);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) levels.count(best, own[i]);
  const float least = levels.least(block, best);
  const float origin = entmax.is_softmax() ? best : least;
  bool near[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) near[i] = own[i] > kNothing && own[i] >= least;
  const Places<kTeamThreads, kOwn> to(near);
  if (to.count <= kFewTokens) {
    scores = few.scores;
    places = few.places;
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!near[i]) continue;
    scores[to.place[i]] = own[i];
    places[to.place[i]] = i * kTeamThreads + thread;
  }
  __syncthreads();
  return {origin, to.count, to.count, scores, places};
}

/// A list of tokens: in shared memory as far as there is room, then in memory.
struct AliveTokens {
  static constexpr int kRoom = 6144;  // 48 KB: two blocks share a multiprocessor of compute capability 8.0 or 9.0
  static constexpr int kBytes = kRoom * (sizeof(float) + sizeof(int32_t));
  static_assert(kFewTokens <= kRoom);

  float* s_scores;  // [kRoom]
  int32_t* s_places;
  float* scores;    // of the block's part of the list, by place, until near ones are packed there
  int32_t* places;  // from kRoom on, until then

  __device__ AliveTokens(float* scores, int32_t* places)
      : s_scores(reinterpret_cast<float*>(dynamic_shared())),
        s_places(reinterpret_cast<int32_t*>(s_scores + kRoom)),
        scores(scores),
        places(places) {}

  __device__ int32_t& place(int i) const { return i < kRoom ? s_places[i] : places[i]; }
};

/// Lists the places, from `first` on, whose bits are set; returns how many. All threads call.
__device__ inline int list_alive(const uint32_t* alive, int tiles, int first, const AliveTokens& list) {
  constexpr int kWords = 4;  // of a thread at a time
  int count = 0;
#pragma unroll 1
  for (int from = kWords * static_cast<int>(threadIdx.x); from - kWords * static_cast<int>(threadIdx.x) < tiles;
       from += kWords * kTeamThreads) {
    uint32_t masks[kWords];
    int own = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      masks[i] = from + i < tiles ? alive[from + i] : 0;
      own += __popc(masks[i]);
    }
    int more;
    int to = count + exclusive_scan<kTeamThreads>(own, more);
    count += more;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
#pragma unroll 1
      for (uint32_t mask = masks[i]; mask; mask &= mask - 1) {
        list.place(to++) = first + (from + i) * kTileRows + __ffs(mask) - 1;
      }
    }
  }
  __syncthreads();
  return count;
}

/// The tokens that can have weight of those that are alive, by a team; few of them come to its first block. The best
/// score, if it is not known, is kNothing. scores are those of the head where alive, by place; where there are too many
/// for shared memory, each block rewrites its part of them, and of places. All threads of the team call.
__device__ inline NearTokens near_of_alive(Team& team, const Entmax<double>& entmax, float best, const uint32_t* alive,
                                           int tiles, float* scores, int32_t* places, NearMemory& memory) {
  const int begin = first_tile(tiles, team.rank, team.size), end = first_tile(tiles, team.rank + 1, team.size);
  const int first = begin * kTileRows, thread = threadIdx.x;
  const AliveTokens list(scores + first, places + first);
  const Levels levels(entmax);
  const int living = list_alive(alive + begin, end - begin, first, list);
  const int inside = min(living, AliveTokens::kRoom), beyond = living - inside;
  const int32_t* beyond_places = list.places + AliveTokens::kRoom;
  const auto beyond_score = [&](int i) { return scores[beyond_places[i]]; };
  float own = kNothing;
#pragma unroll 4
  for (int i = thread; i < inside; i += kTeamThreads) {
    list.s_scores[i] = scores[list.s_places[i]];
    own = larger(own, list.s_scores[i]);
  }
  if (best == kNothing) {
#pragma unroll 4
    for (int i = thread; i < beyond; i += kTeamThreads) own = larger(own, beyond_score(i));
    best = team.largest(own);
  }
#pragma unroll 4
  for (int i = thread; i < inside; i += kTeamThreads) levels.count(best, list.s_scores[i]);
#pragma unroll 4
  for (int i = thread; i < beyond; i += kTeamThreads) levels.count(best, beyond_score(i));
  const float least = levels.least(team, best);
  const auto if_near = [=](float score, int32_t place) {
    return score >= least ? Entry{score, place} : Entry{kNothing, 0};
  };
  NearTokens near{entmax.is_softmax() ? best : least, 0, 0, list.s_scores, list.s_places};
  const auto append = [&](int to, const Entry& entry) {
    near.scores[near.count + to] = entry.value;
    near.places[near.count + to] = entry.place;
  };
  near.count = pack(inside, [&](int i) { return if_near(list.s_scores[i], list.s_places[i]); }, append);
  if (beyond > 0) {
    near.scores = list.scores;
    near.places = list.places;
#pragma unroll 4
    for (int i = thread; i < near.count; i += kTeamThreads) {
      near.scores[i] = list.s_scores[i];
      near.places[i] = list.s_places[i];
    }
    near.count += pack(beyond, [&](int i) { return if_near(beyond_score(i), beyond_places[i]); }, append);
  }
  const Team::Part part = team.part(near.count);
  near.total = part.total;
  if (near.are_few()) {
#pragma unroll 1
    for (int i = thread; i < near.count; i += kTeamThreads) {
      team.of(0, memory.few.scores[part.before + i]) = near.scores[i];
      team.of(0, memory.few.places[part.before + i]) = near.places[i];
    }
    near = {near.origin, part.total, part.total, memory.few.scores, memory.few.places};
    team.sync();
  } else {
    near.divide(team, tiles, memory.many);
  }
  return near;
}

}  // namespace entmaxkv::cuda
