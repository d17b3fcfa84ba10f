// The near tokens of a head: those whose scores are at or above a floor, a score that is proved to be at or below the
// threshold. The floor is at most beta below the best score (entmax.h).
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

/// A histogram of scores that gives a floor: a score that is proved to be at or below the threshold. kLevels levels
/// divide the range from the best score to beta below it, where weights end. The floor is the first level at which the
/// tokens above it have a mass of 1, if each token is moved down from its score to the next level. Moving tokens down
/// lowers the threshold, and more tokens only raise it, so the floor holds. The threshold is above it by less than two
/// steps plus the effect of kEnough.
class Levels {
 public:
  static constexpr int kLevels = 32;              // one per lane
  static constexpr float kStep = 1.0f / kLevels;  // distance between levels, in units of beta

  /// Clears one of the block's two sets of counts: ListScores counts best scores of tiles in set 0, near_of_list tokens
  /// in set 1. All threads call, and then __syncthreads.
  __device__ explicit Levels(const Entmax<float>& entmax, int set = 0)
      : s_counts_(counts(set)), entmax_(entmax), per_level_(kLevels * entmax.gap) {
    if (threadIdx.x < kLevels) s_counts_[threadIdx.x] = 0;
  }

  /// Counts a token. Any thread may call.
  __device__ void count(float best, float score) const {
    const float below = (best - score) * per_level_;
    if (below < kLevels && per_level_ > 0) atomicAdd(&s_counts_[static_cast<int>(fmaxf(below, 0))], 1);
  }

  /// Returns the floor that the tokens of all blocks give; kNothing for softmax. All threads of the team call and all
  /// get the result.
  __device__ float floor(Team& team, float best) const {
    constexpr float kEnough = 1 + 1e-4f;  // a mass of 1, and room for rounding
    __shared__ float s_weights[2 * kLevels], s_counts[kLevels], s_floor;
    const int lane = threadIdx.x;
    team.sync();
    if (lane < kLevels) {
      s_weights[lane] = 0;  // tokens below a level have no weight there
      s_weights[kLevels + lane] = power(lane * kStep, entmax_.beta);
      s_counts[lane] = static_cast<float>(team.sum_of(s_counts_[lane]));
      __syncwarp();
      float mass = 0;
#pragma unroll 4
      for (int level = 0; level < kLevels; ++level) mass += s_counts[level] * s_weights[kLevels + lane - level];
      const uint32_t enough = __ballot_sync(kAllLanes, mass >= kEnough);
      const int level = enough ? __ffs(enough) : kLevels;
      if (lane == 0) s_floor = __fsub_rd(best, level * kStep * entmax_.beta);
    }
    __syncthreads();
    return entmax_.is_softmax() ? kNothing : s_floor;
  }

 private:
  static __device__ int* counts(int set) {
    __shared__ int s_counts[2][kLevels];
    return s_counts[set];
  }

  int* s_counts_;
  const Entmax<float>& entmax_;
  float per_level_;
};

/// The scores that a head's list has, as the blocks of a team look at them: first the best score of each tile, and then
/// all scores of the near tiles, which may hold near tokens. Near tiles are those whose best score is at or above the
/// floor that the tiles' best scores give, which are scores of distinct tokens.
///   The block copies kWindow best scores, or the scores of kBatch tiles, to shared memory at a time. Where one window
/// and one batch are all, each score is copied once.
class ListScores {
 public:
  static constexpr int kWindow = 4096, kBatch = 256;
  static constexpr int kAlone = 192;  // so many near tiles, or fewer, are left to one block

  struct Memory {
    union {
      float maxima[kWindow];
      FewTokens few;  // where one window is all, few near tokens are written when nobody needs the maxima any longer
    };
    float scores[kBatch * kTileRows];
    uint16_t tiles[kWindow];  // near tiles, counted from the beginning of the window
  };

  float best, floor;  // best score of the list, and the floor of the tiles' best scores

  /// maxima [tiles]: best score of each tile. scores [tiles, kTileRows]: all scores of the near tiles. The blocks of
  /// `lookers` divide the tiles. All their threads call.
  __device__ ListScores(Team& lookers, const Entmax<float>& entmax, const float* maxima, const float* scores, int tiles,
                        Memory& memory)
      : s_(memory), maxima_(maxima), scores_(scores) {
    // Whole words of 16 bytes are copied.
    const int words = ceil_div(tiles, 4);
    begin_ = share_begin(words, lookers.rank, lookers.size) * 4;
    end_ = min(share_begin(words, lookers.rank + 1, lookers.size) * 4, tiles);
    one_window_ = ceil_div(words, lookers.size) * 4 <= kWindow;
    const Levels levels(entmax);
    float own = kNothing;
    for_each_maximum([&](float score) { own = larger(own, score); });
    best = lookers.largest(own);
    for_each_maximum([&](float score) { levels.count(best, score); });
    floor = levels.floor(lookers, best);
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

  /// Calls body(run) for each batch, with this warp's run of tokens; score(i) and place(i) are those of token i. All
  /// threads of the block call.
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
        body(WarpRun::of_block(0, count * kTileRows));
      }
    }
  }

  __device__ float score(int i) const { return s_.scores[i]; }
  __device__ int place(int i) const { return (window_ + s_.tiles[batch_ + i / kTileRows]) * kTileRows + i % kTileRows; }

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
    const auto is_near = [&](float score) { return !(score < floor); };  // NaN is near
    const Kept kept = Kept::of<1>(run, read, is_near);
    compact<1>(run, kept.before, read, is_near, [&](int to, int i, float) { s_.tiles[to] = static_cast<uint16_t>(i); });
    near_ = kept.all;
    batch_ = -1;
    __syncthreads();
  }

  /// Copies the scores of `count` near tiles of the window, unless they are there. A barrier follows.
  __device__ void copy_batch(int first, int count) {
    if (batch_ == first) return;
    __syncthreads();  // the last batch has been read
    batch_ = first;
    constexpr int kWords = kTileRows / 4;
    auto* s_words = reinterpret_cast<uint4*>(s_.scores);
#pragma unroll 4
    for (int i = threadIdx.x; i < count * kWords; i += kTeamThreads) {
      const float* tile = scores_ + int64_t{window_ + s_.tiles[first + i / kWords]} * kTileRows;
      copy_async(s_words[i], tile + i % kWords * 4, true);
    }
    end_copies();
  }

  static __device__ void end_copies() {
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
  }

  Memory& s_;
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

/// Finds the near tokens of a head. All threads of the team call. If the near tokens are few, they come into `few` of
/// the team's first block, and only that block may use them.
__device__ inline NearTokens near_of_list(Team& team, const Entmax<float>& entmax, ListScores& list,
                                          const NearArrays& arrays) {
  enum Pass { kLevel, kCount, kWrite };
  const Levels levels(entmax, 1);
  __syncthreads();
  NearTokens near{};
  float floor = 0;
  int own = 0, before = 0;
  int batches = 0;
  Kept kept{0, 0};  // of the batch that was counted last
#pragma unroll 1    // one copy of the code that goes through the batches
  for (int pass = kLevel; pass <= kWrite; ++pass) {
    if (pass == kCount) floor = levels.floor(team, list.best);
    if (pass == kWrite) {
      const Team::Part part = team.part(own);
      near.scores = arrays.scores;
      near.places = arrays.places;
      near.count = part.total;
      near.set_origin(entmax, list.best, floor);
      if (near.few() && list.one_window()) {
        near.scores = list.few(team, 0).scores;
        near.places = list.few(team, 0).places;
      }
      before = part.before;
    }
    const auto read = [&](int i) { return list.score(i); };
    const auto is_near = [&](float score) { return score > kNothing && score >= floor; };  // kNothing fills tiles up
    list.for_each_batch([&](const WarpRun& run) {
      if (pass == kLevel) {
        run.visit<1>(read, [&](int, float score, bool there) {
          if (there && score >= list.floor) levels.count(list.best, score);
        });
        return;
      }
      batches += pass == kCount;
      if (pass == kCount || batches > 1) kept = Kept::of<1>(run, read, is_near);
      if (pass == kCount) {
        own += kept.all;
        return;
      }
      compact<1>(run, before + kept.before, read, is_near, [&](int to, int i, float score) {
        near.scores[to] = score;
        near.places[to] = list.place(i);
      });
      before += kept.all;
    });
  }
  team.sync();
  if (near.few() && list.one_window()) {  // a block's own shared memory has a faster address
    near.scores = list.few().scores;
    near.places = list.few().places;
  }
  return near;
}

}  // namespace entmaxkv::cuda
