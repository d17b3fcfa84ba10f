// The near tokens of a head: those whose scores are above a floor, a score that is proved to be below the threshold.
// The floor is at most beta below the best score (entmax.h).
#pragma once

#include "../common/ring.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

/// Returns where the share of a block begins, if the blocks of a team divide `count` items; of block `size`, the end.
__device__ inline int share_begin(int count, int rank, int size) {
  return static_cast<int>(static_cast<unsigned>(count * rank) /
                          static_cast<unsigned>(size));  // the product is below 2^30
}

/// Near tokens of a head that has few of them.
struct FewTokens {
  float scores[kFewTokens];
  int32_t places[kFewTokens];
};

/// The near tokens of a head, in the order of the list.
struct NearTokens : NearScores {
  int32_t* places;
};

/// A histogram of scores that gives a floor: a score that is proved to be below the threshold. kLevels levels divide
/// the range from the best score to beta below it, where weights end. If each token is moved down from its score to the
/// end of its level, the threshold falls, and more tokens only raise it. So the threshold is above the end of the first
/// level up to which the tokens, moved down, have a mass of 1. The floor is the end of the next level, which makes room
/// for rounding. Where only kAllNear tokens or fewer reach the last level, a search would take longer than it saves:
/// the floor is the end of that level.
class Levels {
 public:
  static constexpr int kLevels = kTeamThreads;    // one per thread
  static constexpr float kStep = 1.0f / kLevels;  // what a level spans, in units of beta
  static constexpr int kAllNear = 128;

  struct Floor {
    int level = -1;   // tokens up to this level are near
    float score = 0;  // where that level ends
    int own = 0;      // tokens of this block up to that level
  };

  /// Clears one of the block's two sets of counts: best scores of tiles are counted in set 0, tokens in set 1. All
  /// threads call, and then __syncthreads.
  __device__ explicit Levels(const Entmax<float>& entmax, int set = 0)
      : s_counts_(counts(set)), beta_(entmax.beta), per_level_(kLevels * entmax.gap) {
    s_counts_[threadIdx.x] = 0;
  }

  /// Returns whether the level of a score is at most `level`. That of kNothing or NaN never is. For softmax, all other
  /// scores have level 0.
  __device__ bool reaches(int level, float best, float score) const { return depth(best, score) < level + 1; }

  /// Counts a token that reaches level kLevels - 1. Any thread may call.
  __device__ void count(float best, float score) const {
    atomicAdd(&s_counts_[static_cast<int>(depth(best, score))], 1);
  }

  /// Returns the floor that the tokens of all blocks give. All threads of the team call and all get the result.
  __device__ Floor floor(Team& team, float best) const {
    __shared__ float s_tokens[kLevels], s_powers[kLevels];
    __shared__ Floor s_floor;
    team.sync();
    s_powers[threadIdx.x] = threadIdx.x > 0 ? power(threadIdx.x * kStep, beta_) : 0;
    s_tokens[threadIdx.x] = static_cast<float>(team.sum_of(s_counts_[threadIdx.x]));
    __syncthreads();
    if (threadIdx.x < 32) {
      const int level = min(first_with_mass(s_tokens, s_powers) + 1, kLevels - 1);
      int own = 0;
      for (int other = threadIdx.x; other <= level; other += 32) own += s_counts_[other];
      own = sum<32>(own);
      if (threadIdx.x == 0) s_floor = {level, __fsub_rd(best, (level + 1) * kStep * beta_), own};
    }
    __syncthreads();
    return s_floor;
  }

 private:
  static __device__ int* counts(int set) {
    __shared__ int s_counts[2][kLevels];
    return s_counts[set];
  }

  /// Returns how many levels a score is below the best.
  __device__ float depth(float best, float score) const { return (best - score) * per_level_; }

  /// Returns the first level up to which the tokens, moved down to its end, have a mass of 1; kLevels if there is none,
  /// or if all tokens are near. s_powers[n] is the mass of a token n levels above. All lanes of a warp call.
  static __device__ int first_with_mass(const float* s_tokens, const float* s_powers) {
    constexpr float kEnough = 1 + 1e-4f;  // a mass of 1, and room for rounding
    constexpr int kProbes = 3, kOwn = kLevels / 32;
    const int lane = threadIdx.x;
    float tokens[kOwn], all = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      tokens[i] = s_tokens[i * 32 + lane];
      all += tokens[i];
    }
    if (sum<32>(all) <= kAllNear) return kLevels;
    int first = 0, end = kLevels;
#pragma unroll 1
    while (first < end) {
      int probes[kProbes];
      float masses[kProbes] = {};
#pragma unroll
      for (int n = 0; n < kProbes; ++n) {
        probes[n] = first + (end - first) * (n + 1) / (kProbes + 1);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) masses[n] += tokens[i] * s_powers[max(probes[n] - i * 32 - lane, 0)];
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
#pragma unroll
        for (float& mass : masses) mass += shuffle_xor(mass, distance);
      }
#pragma unroll
      for (int n = 0; n < kProbes; ++n) {
        if (masses[n] >= kEnough) {
          end = min(end, probes[n]);
        } else {
          first = max(first, probes[n] + 1);
        }
      }
    }
    return first;
  }

  int* s_counts_;
  float beta_, per_level_;
};

/// The scores that a head's list has, as the blocks of a team look at them: first the best score of each tile, and then
/// all scores of the near tiles, which may hold near tokens. Near tiles are those whose best score is above the floor
/// that the tiles' best scores give, which are scores of distinct tokens.
///   The block copies kWindow best scores, or the scores of kBatch tiles, to shared memory at a time. Where one window
/// and one batch are all, each score is copied once.
class ListScores {
 public:
  static constexpr int kWindow = 4096, kBatch = 320;
  static constexpr int kAlone = 128;  // so many near tiles, or fewer, are left to one block
  static constexpr int kFours = kTileRows / 4;

  struct Memory {
    union {
      float maxima[kWindow];
      FewTokens few;  // where one window is all, few near tokens are written when nobody needs the maxima any longer
    };
    float4 scores[kBatch * kFours];
    uint16_t tiles[kWindow];  // near tiles, counted from the beginning of the window
  };

  float best;           // best score of the list
  Levels::Floor floor;  // of the tiles' best scores

  /// maxima [tiles]: best score of each tile. scores [tiles, kTileRows]: all scores of the near tiles. The blocks of
  /// `lookers` divide the tiles. All their threads call.
  __device__ ListScores(Team& lookers, const Entmax<float>& entmax, const float* maxima, const float* scores, int tiles,
                        Memory& memory)
      : s_(memory), levels_(entmax), maxima_(maxima), scores_(scores) {
    // Whole words of 16 bytes are copied.
    const int words = ceil_div(tiles, 4);
    begin_ = share_begin(words, lookers.rank, lookers.size) * 4;
    end_ = min(share_begin(words, lookers.rank + 1, lookers.size) * 4, tiles);
    one_window_ = ceil_div(words, lookers.size) * 4 <= kWindow;
    float own = kNothing;
    for_each_maximum([&](float score) { own = larger(own, score); });
    best = lookers.largest(own);
    for_each_maximum([&](float score) {
      if (levels_.reaches(Levels::kLevels - 1, best, score)) levels_.count(best, score);
    });
    floor = levels_.floor(lookers, best);
    if (!one_window_) return;
    copy_window(begin_);
    list();
    last_ = near_;
  }

  /// Returns whether the tiles of each block are one window, and then the number of this block's near tiles.
  __device__ bool one_window() const { return one_window_; }
  __device__ int near_tiles() const { return near_; }

  /// Leaves to this block its share of the near tiles of one window, which all blocks of the team have listed.
  __device__ void share(const Team& team) {
    first_ = share_begin(near_, team.rank, team.size);
    last_ = share_begin(near_, team.rank + 1, team.size);
  }

  /// Calls body(run) for each batch, with this warp's run of fours of tokens; scores(i) are those of a four, and
  /// place(i) is that of its first token. All threads of the block call.
  template <typename Body>
  __device__ void for_each_batch(Body body) {
#pragma unroll 1
    for (int window = begin_; window == begin_ || window < end_; window += kWindow) {
      if (!one_window_) {
        copy_window(window);
        list();
        first_ = 0, last_ = near_;
      }
#pragma unroll 1
      for (int first = first_; first < last_; first += kBatch) {
        const int count = min(kBatch, last_ - first);
        copy_batch(first, count);
        body(WarpRun::of_block(0, count * kFours));
      }
    }
  }

  __device__ float4 scores(int i) const { return s_.scores[i]; }
  __device__ int place(int i) const { return (window_ + s_.tiles[batch_ + i / kFours]) * kTileRows + i % kFours * 4; }

  /// Memory for few near tokens, in the block of a rank of the team.
  __device__ FewTokens& few(const Team& team, int rank) const { return team.of(rank, s_.few); }
  __device__ FewTokens& few() const { return s_.few; }

 private:
  template <typename Use>
  __device__ void for_each_maximum(Use use) {
#pragma unroll 1
    for (int window = begin_; window < end_; window += kWindow) {
      copy_window(window);
#pragma unroll 1
      for (int i = threadIdx.x; i < min(kWindow, end_ - window); i += kTeamThreads) use(s_.maxima[i]);
    }
  }

  /// Copies the best scores of a window's tiles, unless they are there. A barrier follows.
  __device__ void copy_window(int window) {
    if (window_ == window) return;
    __syncthreads();  // the last window has been read
    window_ = window;
    auto* s_words = reinterpret_cast<uint4*>(s_.maxima);
    const auto* words = reinterpret_cast<const uint4*>(maxima_ + window);
#pragma unroll 4
    for (int i = threadIdx.x; i < ceil_div(min(kWindow, end_ - window), 4); i += kTeamThreads) {
      copy_async(s_words[i], words + i, true);
    }
    end_copies();
  }

  /// Lists the near tiles of the window. A barrier follows.
  __device__ void list() {
    const WarpRun run = WarpRun::of_block(0, min(kWindow, end_ - window_));
    const auto read = [&](int i) { return s_.maxima[i]; };
    const auto is_near = [&](float score) { return levels_.reaches(floor.level, best, score); };
    constexpr int kAtOnce = 4;
    const Kept kept = Kept::of<kAtOnce>(run, read, is_near);
    compact<kAtOnce>(run, kept.before, read, is_near,
                     [&](int to, int i, float) { s_.tiles[to] = static_cast<uint16_t>(i); });
    near_ = kept.all;
    batch_ = -1;
    __syncthreads();
  }

  /// Copies the scores of `count` near tiles of the window, unless they are there. A barrier follows.
  __device__ void copy_batch(int first, int count) {
    if (batch_ == first) return;
    __syncthreads();  // the last batch has been read
    batch_ = first;
    auto* s_words = reinterpret_cast<uint4*>(s_.scores);
#pragma unroll 4
    for (int i = threadIdx.x; i < count * kFours; i += kTeamThreads) {
      const float* tile = scores_ + int64_t{window_ + s_.tiles[first + i / kFours]} * kTileRows;
      copy_async(s_words[i], tile + i % kFours * 4, true);
    }
    end_copies();
  }

  static __device__ void end_copies() {
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
  }

  Memory& s_;
  Levels levels_;
  const float *maxima_, *scores_;
  int begin_, end_;  // the tiles that this block looks at
  bool one_window_;
  int window_ = -1;           // first tile of the window in shared memory
  int near_ = 0;              // near tiles of the window
  int batch_ = -1;            // first of the near tiles whose scores are in shared memory
  int first_ = 0, last_ = 0;  // the near tiles of the window that this block takes
};

/// The global memory of a head for its near tokens.
struct NearArrays {
  float* scores;    // [list]
  int32_t* places;  // [list]
};

/// Finds the near tokens of a head: those above the floor of the tiles' best scores, and if they are many, above the
/// floor of the tokens. All threads of the team call. If the near tokens are few, they come into `few` of the team's
/// first block, and only that block may use them.
__device__ inline NearTokens near_of_list(Team& team, const Entmax<float>& entmax, ListScores& list,
                                          const NearArrays& arrays) {
  enum Pass { kTry, kCount, kWrite };
  constexpr int kAtOnce = 2;
  const Levels levels(entmax, 1);
  __syncthreads();
  Levels::Floor floor = list.floor;
  // One block writes the near tokens while it counts them, as they may be few.
  const bool alone = team.size == 1 && list.one_window();
  NearTokens near{};
  int before = 0;
  const auto to_few = [&](int rank) {
    near.scores = list.few(team, rank).scores;
    near.places = list.few(team, rank).places;
  };
  if (alone) to_few(0);
  const auto read = [&](int i) { return list.scores(i); };
  const auto is_near = [&](float score) { return levels.reaches(floor.level, list.best, score); };
#pragma unroll 1  // one copy of the code that goes through the batches
  for (int pass = kTry;; pass = pass == kTry && near.few() ? kWrite : pass + 1) {
    const int limit = pass == kTry ? (alone ? kFewTokens : 0) : near.count;  // tokens that are written
    int own = 0;
    list.for_each_batch([&](const WarpRun& run) {
      if (pass == kCount) {
        run.visit<kAtOnce>(read, [&](int, const float4& four, bool there) {
          const float scores[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (const float score : scores) {
            if (there && is_near(score)) levels.count(list.best, score);
          }
        });
        return;
      }
      const Kept kept = Kept::of<kAtOnce>(run, read, [&](const float4& four) {
        return is_near(four.x) + is_near(four.y) + is_near(four.z) + is_near(four.w);
      });
      int first = before + own + kept.before;
      own += kept.all;
      if (limit == 0) return;
      run.visit<kAtOnce>(read, [&](int i, const float4& four, bool there) {
        const float scores[4] = {four.x, four.y, four.z, four.w};
        uint32_t nears[4];  // lanes whose kth token is near
#pragma unroll
        for (int k = 0; k < 4; ++k) nears[k] = __ballot_sync(kAllLanes, there && is_near(scores[k]));
        if (!(nears[0] | nears[1] | nears[2] | nears[3])) return;
        const uint32_t own_lane = 1u << threadIdx.x % 32;
        int to = first;
#pragma unroll
        for (const uint32_t lanes : nears) {
          to += __popc(lanes & (own_lane - 1));
          first += __popc(lanes);
        }
        const int place = list.place(i);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (!(nears[k] & own_lane)) continue;
          if (to < limit) {
            near.scores[to] = scores[k];
            near.places[to] = place + k;
          }
          ++to;
        }
      });
    });
    if (pass == kWrite) break;
    if (pass == kCount) {
      floor = levels.floor(team, list.best);
      floor.level = min(floor.level, list.floor.level);  // tokens beyond that level were not counted
      own = floor.own;
    }
    const Team::Part part = team.part(own);
    near.count = part.total;
    if (pass == kTry && alone && near.few()) break;
    before = part.before;
    if (near.few() && list.one_window()) {
      to_few(0);
    } else {
      near.scores = arrays.scores;
      near.places = arrays.places;
    }
  }
  near.set_origin(entmax, list.best, floor.score);
  team.sync();
  if (near.few() && list.one_window()) {  // a block's own shared memory has a faster address
    near.scores = list.few().scores;
    near.places = list.few().places;
  }
  return near;
}

}  // namespace entmaxkv::cuda
