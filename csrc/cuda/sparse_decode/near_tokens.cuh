// The near tokens of a head: those whose scores are at or above a level that is proved to be at or below the threshold.
// The level is at most beta below the best score (entmax.h).
#pragma once

#include "../common/ring.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

constexpr int kShort = 4096;  // most tokens of a list whose scores all fit into a block's shared memory
static_assert(kShort % kTeamThreads == 0);

/// Most tokens of a list that is one part, or four parts.
constexpr int kOnePart = 8 << 10, kFourParts = 128 << 10;

/// Returns how many parts a list has. The number depends only on its length.
__host__ __device__ constexpr int parts_of(int64_t tokens) {
  return tokens <= kOnePart ? 1 : tokens <= kFourParts ? 4 : kMostParts;
}

/// Returns the first tile of a part, where `parts` parts (or blocks) divide a list's tiles.
__device__ inline int first_tile(int tiles, int part, int parts) {
  return static_cast<int>(int64_t{tiles} * part / parts);
}

/// Near tokens of a head that has at most kFewTokens of them.
struct FewTokens {
  float scores[kFewTokens];
  int32_t places[kFewTokens];
};

/// What a block keeps about the parts of a head's near tokens, where there are more.
struct ManyTokens {
  int ends[kMostParts];                  // index, among the block's near tokens, of the end of each of its parts
  float sums[kMostParts][kTeamThreads];  // in the team's first block: the weighted value sums of all parts
  int counts[kMostParts];                // in the team's first block: the tokens with weight of all parts
};

/// The shared memory of a block for near tokens.
union NearMemory {
  FewTokens few;
  ManyTokens many;
};

/// A block's near tokens of a head, in the order of the list. If they are few, the team's first block has all of them,
/// in shared memory.
struct NearTokens {
  float origin;  // as in NearScores
  int total;     // near tokens of all blocks of the team
  int count;     // near tokens of this block
  float* scores;
  int32_t* places;
  int parts = 1;

  __device__ bool are_few() const { return total <= kFewTokens; }

  /// Sets memory.ends: where the parts of a list of `tiles` tiles end among the near tokens of this block. All threads
  /// of the block call; a barrier follows.
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

/// Returns how far below the best score a token can have weight, rounded up. A token that is kept because of the
/// rounding gets the weight 0.
__device__ inline float reach_of(const Entmax<double>& entmax) {
  return static_cast<float>(entmax.beta) * (1 + 0x1p-22f);
}

/// A histogram of scores that gives a lower bound of the threshold. kLevels levels divide the range from the best score
/// to beta below it, where weights end. The bound is the first level at which the tokens above it have a mass of 1, if
/// each token is moved down from its score to the next level. Moving tokens down lowers the threshold, so the bound
/// holds. The threshold is above the bound by less than two steps plus the effect of kEnough. More tokens only raise
/// the threshold.
class Levels {
 public:
  static constexpr int kLevels = 32;              // one per lane
  static constexpr float kStep = 1.0f / kLevels;  // distance between levels, in units of beta

  /// Clears the block's counts. All threads call, and then __syncthreads.
  __device__ explicit Levels(const Entmax<double>& entmax)
      : counts_(counts()), entmax_(entmax), per_level_(static_cast<float>(kLevels * entmax.gap)) {
    if (threadIdx.x < kLevels) counts_[threadIdx.x] = 0;
  }

  /// Counts a token. Any thread may call.
  __device__ void count(float best, float score) const {
    const float below = (best - score) * per_level_;
    if (below < kLevels && per_level_ > 0) atomicAdd(&counts_[static_cast<int>(fmaxf(below, 0))], 1);
  }

  /// Returns the score of the level that bounds the threshold, from the tokens of all blocks; kNothing for softmax. All
  /// threads of the team call and all get the result.
  __device__ float least(Team& team, float best) const {
    constexpr float kEnough = 1 + 1e-4f;  // a mass of 1, and room for rounding
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

/// Finds the near tokens of a list of at most kShort tokens. scores [tokens] holds all scores, in shared memory.
/// The near tokens go to `few`, if they fit, else to the front of scores and places. All threads of the block call and
/// all get the result.
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

/// The candidates of a block's part of a list: the first kRoom in shared memory, the others in global memory.
struct CandidateList {
  static constexpr int kRoom = 6144;  // 48 KB, so that two blocks fit a multiprocessor of compute capability 8.0 or 9.0
  static constexpr int kBytes = kRoom * (sizeof(float) + sizeof(int32_t));
  static_assert(kFewTokens <= kRoom);

  float* s_scores;    // [kRoom] scores of candidates
  int32_t* s_places;  // [kRoom] their places in the list
  float* scores;      // in global memory: scores of the block's part of the list, by place; then of its near tokens
  int32_t* places;    // in global memory: places of the candidates from kRoom on; then of the block's near tokens

  __device__ CandidateList(float* scores, int32_t* places)
      : s_scores(reinterpret_cast<float*>(dynamic_shared())),
        s_places(reinterpret_cast<int32_t*>(s_scores + kRoom)),
        scores(scores),
        places(places) {}

  /// The place in the list of the ith candidate.
  __device__ int32_t& place(int i) const { return i < kRoom ? s_places[i] : places[i]; }
};

/// Writes the places of the set bits of candidates [tiles] to `list`; bit 0 has place `first`. Returns their number to
/// all threads. All threads of the block call; a barrier follows.
__device__ inline int list_candidates(const uint32_t* candidates, int tiles, int first, const CandidateList& list) {
  constexpr int kWords = 4;  // words that a thread reads at once
  int count = 0;
#pragma unroll 1
  for (int from = kWords * static_cast<int>(threadIdx.x); from - kWords * static_cast<int>(threadIdx.x) < tiles;
       from += kWords * kTeamThreads) {
    uint32_t masks[kWords];
    int own = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      masks[i] = from + i < tiles ? candidates[from + i] : 0;
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

/// Finds the near tokens of a head among its candidates.
///   best                best score; kNothing if it is not known
///   candidates [tiles]  a bit for each place of the list
///   scores [list]       scores of the candidates, by place
///   places [list]       scratch memory
/// A block whose candidates do not fit into shared memory overwrites its part of scores and places. If the near tokens
/// are few, they go to memory.few of the first block. All threads of the team call; each block gets its own near
/// tokens.
__device__ inline NearTokens near_of_candidates(Team& team, const Entmax<double>& entmax, float best,
                                                const uint32_t* candidates, int tiles, float* scores, int32_t* places,
                                                NearMemory& memory) {
  const int begin = first_tile(tiles, team.rank, team.size), end = first_tile(tiles, team.rank + 1, team.size);
  const int first = begin * kTileRows, thread = threadIdx.x;
  const CandidateList list(scores + first, places + first);
  const Levels levels(entmax);
  const int count = list_candidates(candidates + begin, end - begin, first, list);
  const int inside = min(count, CandidateList::kRoom), beyond = count - inside;  // in shared memory, in global memory
  const int32_t* beyond_places = list.places + CandidateList::kRoom;
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
