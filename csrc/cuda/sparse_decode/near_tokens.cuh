// The near tokens of a head: those whose scores are above a floor, a score that is proved to be below the threshold.
#pragma once

#include <cstddef>

#include "../common/ring.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

/// Finds a floor from scores of some distinct tokens, of which `best` is the best of the list: a score that is proved
/// to be below the threshold of these tokens, and other tokens only raise it. Newton's steps do not pass a threshold,
/// so the search may end early: where few scores are above, more steps would take longer than they save. `scores` is as
/// FewScores. All its threads call and all get the result.
template <bool kSquare, typename Scores>
__device__ float floor_of(const Entmax<float>& entmax, float best, const Scores& scores) {
  constexpr float kRoom = 0x1p-9f;  // for rounding
  constexpr float kAllNear = 128;
  const float threshold = rough_threshold<kSquare, CountedExcess>(
      entmax, best, -1, kRoom, scores, [](const CountedExcess& above) { return above.count <= kAllNear; });
  return __fsub_rd(best, entmax.beta * (kRoom - threshold));
}

/// Does the same for any alpha. The usual one has code of its own. The floor is no lower than where weights end: the
/// scores of tiles that are lower may not have been written.
template <typename Scores>
__device__ float find_floor(const Entmax<float>& entmax, float best, const Scores& scores) {
  const float end = __fsub_rd(best, reach_of(entmax));
  if (entmax.beta == 2) return fmaxf(end, floor_of<true>(entmax, best, scores));
  if (entmax.beta <= RoughEntmax<false>::kMostBeta) return fmaxf(end, floor_of<false>(entmax, best, scores));
  return end;
}

/// Returns where the share of a block begins, if the blocks of a team divide `count` items; of block `size`, the end.
__device__ inline int share_begin(int count, int rank, int size) {
  return static_cast<int>(static_cast<unsigned>(count) * rank / size);  // the product is below 2^30
}

/// Near tokens of a head that has few of them.
struct FewTokens {
  float scores[kFewTokens];
  int32_t places[kFewTokens];
};

/// The near tokens of a head, in the order of the list.
struct NearTokens : NearScores {
  int32_t* places;

  /// Returns whether one block solves.
  __device__ bool few() const { return count <= kFewTokens; }
};

/// The scores that a head's list has, as the blocks of a team look at them: first the best score of each tile, and then
/// all scores of the near tiles, which may hold near tokens. Near tiles are those whose best score is above the floor
/// that the tiles' best scores give, which are scores of distinct tokens.
///   The block copies kWindow best scores, or the scores of a batch of tiles, to shared memory at a time. Where one
/// window and one batch are all, each score is copied once.
class ListScores {
 public:
  // Tiles. On an H200 with 32 heads a team has seven blocks. Their windows have room for lists of 1.1 million tokens,
  // and their largest batches, together with the memory of few near tokens, for lists of 136 thousand.
  static constexpr int kWindow = 5120, kLeastBatch = 256, kMostBatch = 352;
  static constexpr int kAlone = 128;       // so many near tiles, or fewer, are left to one block
  static constexpr int kManyTiles = 1024;  // where they are more, near tokens are not counted
  static constexpr int kFours = kTileRows / 4, kWarps = kTeamThreads / 32;
  static constexpr int kTileBytes = kTileRows * sizeof(float);
  static constexpr int kTurn = 320;  // tiles of a turn of `compact`

  struct Memory {
    union {
      float4 maxima[kWindow / 4];
      uint16_t kept[kWarps][kTurn / kWarps * kTileRows];  // tokens that each warp keeps in a turn
    };
    uint16_t tiles[kWindow];              // near tiles, counted from the beginning of the window
    FewTokens few;                        // the near tokens, if they are few
    float4 scores[kLeastBatch * kFours];  // and more, if batches are larger
  };

  /// Returns the bytes of a block's Memory with batches of so many tiles.
  static constexpr int memory_bytes(int batch_tiles) {
    return static_cast<int>(offsetof(Memory, scores)) + batch_tiles * kTileBytes;
  }

  /// Returns the tiles of a batch on the current device.
  static int batch_tiles() {
    constexpr int kOther = 3 << 10;     // bytes of shared memory that `solve` has beside Memory, at most
    constexpr int kReserved = 1 << 10;  // bytes of a block that CUDA takes
    static_assert(2 * (memory_bytes(kMostBatch) + kOther + kReserved) <= 228 << 10);  // two blocks fit an H200
    const int room = device_property(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kOther - memory_bytes(0);
    return std::clamp(room / kTileBytes, kLeastBatch, kMostBatch);
  }

  static constexpr int kFewWords = sizeof(FewTokens) / sizeof(float4);
  static_assert(offsetof(Memory, scores) == offsetof(Memory, few) + sizeof(FewTokens));
  static_assert(kTurn % kWarps == 0);

  /// Returns the block's Memory, which begins its dynamic shared memory.
  static __device__ Memory& memory() { return *reinterpret_cast<Memory*>(dynamic_shared()); }

  float best;   // best score of the list
  float floor;  // from the tiles' best scores

  /// maxima [tiles]: best score of each tile. scores [tiles, kTileRows]: all scores of the near tiles. The blocks of
  /// `lookers` divide the tiles. All their threads call.
  __device__ ListScores(Team& lookers, const Entmax<float>& entmax, const float* maxima, const float* scores, int tiles,
                        int batch_tiles)
      : maxima_(maxima), scores_(scores), batch_tiles_(batch_tiles) {
    // Whole words of 16 bytes are copied.
    const int words = ceil_div(tiles, 4);
    begin_ = share_begin(words, lookers.rank, lookers.size) * 4;
    end_ = min(share_begin(words, lookers.rank + 1, lookers.size) * 4, tiles);
    one_window_ = words <= lookers.size * (kWindow / 4);
    float own = kNothing;
    for_each_maximum([&](float score) { own = larger(own, score); });
    best = lookers.largest(own);
    floor = find_floor(entmax, best, TeamScores{lookers, [this](auto use) { for_each_maximum(use); }});
    if (!one_window_) return;
    copy_window(begin_);
    list();
    last_ = near_;
  }

  /// Returns whether the tiles of each block are one window.
  __device__ bool one_window() const { return one_window_; }

  /// Returns the number of near tiles of this block, before share(); 0 if its tiles are more than one window.
  __device__ int near_tiles() const { return near_; }

  /// Leaves to this block its share of the near tiles of one window, which all blocks of the team have listed.
  __device__ void share(const Team& team) {
    is_listed_by_all_ = true;
    first_ = share_begin(near_, team.rank, team.size);
    last_ = share_begin(near_, team.rank + 1, team.size);
  }

  /// Returns whether this block has listed so many near tiles that near tokens are taken for many. Each near tile has a
  /// near token.
  __device__ bool has_many() const { return one_window_ && near_ > kManyTiles; }

  /// Returns whether all blocks of the team have listed the same near tiles.
  __device__ bool is_listed_by_all() const { return is_listed_by_all_; }

  /// Lets batches take the memory of few near tokens, too, for good, and forgets what has been copied.
  __device__ void widen_batches() {
    first_word_ = 0;
    batch_ = -1;
  }

  /// Calls add(score) for each token of this block's near tiles. All threads of the block call.
  template <typename Add>
  __device__ void for_each(Add add) {
    for_each_batch([&](int fours) {
#pragma unroll 2
      for (int i = threadIdx.x; i < fours; i += kTeamThreads) {
        const float4 four = scores(i);
        add(four.x), add(four.y), add(four.z), add(four.w);
      }
    });
  }

  /// Tokens that a warp has kept in a turn of `compact`, in shared memory.
  struct Kept {
    const ListScores& list;
    const float* scores;
    const uint16_t* tokens;  // counted from the beginning of the turn
    int first_tile;          // of the turn, in the batch
    int count;
    int begin;  // index of the first among all that are kept

    __device__ int place(int nth) const {
      const int token = tokens[nth];
      return list.place(first_tile + token / kTileRows) + token % kTileRows;
    }
  };

  /// Stream compaction of this block's near tiles: keeps the tokens for whose score keep(score) is true, as the tokens
  /// first, first + 1, ... in the order of the list. Each warp takes a stretch of the tiles of a turn, and then calls
  /// use(kept). Returns the end of all. Overwrites what is in shared memory, so another look must widen_batches()
  /// before. All threads of the block call.
  template <typename Keep, typename Use>
  __device__ int compact(int first, Keep keep, Use use) {
    constexpr int kAtOnce = 4;
    __shared__ int s_counts[2][kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int end = first, turn = 0;
    for_each_batch([&](int fours) {
#pragma unroll 1
      for (int begin = 0; begin < fours / kFours; begin += kTurn) {
        const int tiles = min(kTurn, fours / kFours - begin), each = ceil_div(tiles, kWarps);
        const int own_begin = min(warp * each, tiles), own_end = min(own_begin + each, tiles);
        // The kept scores come to the front of the scores that this warp has read.
        float* own = reinterpret_cast<float*>(&scores((begin + own_begin) * kFours));
        uint16_t* tokens = memory().kept[warp];
        int count = 0;
#pragma unroll 1
        for (int tile = own_begin; tile < own_end; tile += kAtOnce) {
          float some[kAtOnce];
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n) {
            some[n] = tile + n < own_end ? own[(tile + n - own_begin) * kTileRows + lane] : kNothing;
          }
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n) {
            const bool keeps = keep(some[n]);
            const uint32_t lanes = __ballot_sync(kAllLanes, keeps);  // all of them have read
            if (keeps) {
              const int to = count + __popc(lanes & ((1u << lane) - 1));
              own[to] = some[n];
              tokens[to] = static_cast<uint16_t>((tile + n) * kTileRows + lane);
            }
            count += __popc(lanes);
          }
        }
        turn ^= 1;  // some threads may still read the counts of the last turn
        if (lane == 0) s_counts[turn][warp] = count;
        __syncthreads();
        int before = end;
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
          const int kept = s_counts[turn][other];
          if (other < warp) before += kept;
          end += kept;
        }
        use(Kept{*this, own, tokens, begin, count, before});
        __syncwarp();  // all lanes have read the tokens
      }
    });
    return end;
  }

 private:
  /// Calls body(fours) for each batch, with the number of its fours of tokens; scores(i) are those of a four. All
  /// threads of the block call.
  template <typename Body>
  __device__ void for_each_batch(Body body) {
    const int most = batch_tiles_ + (kFewWords - first_word_) / kFours;
#pragma unroll 1
    for (int window = begin_; window == begin_ || window < end_; window += kWindow) {
      if (!one_window_) {
        copy_window(window);
        list();
        first_ = 0, last_ = near_;
      }
#pragma unroll 1
      for (int first = first_; first < last_; first += most) {
        const int count = min(most, last_ - first);
        copy_batch(first, count);
        body(count * kFours);
      }
    }
  }

  __device__ float4& scores(int i) const { return reinterpret_cast<float4*>(&memory().few)[first_word_ + i]; }

  /// Returns the place of the first token of a tile of the batch.
  __device__ int place(int tile) const { return (window_ + memory().tiles[batch_ + tile]) * kTileRows; }

  /// Calls use(score) for the best score of each tile, and at the end for some that are kNothing.
  template <typename Use>
  __device__ void for_each_maximum(Use use) {
#pragma unroll 1
    for (int window = begin_; window < end_; window += kWindow) {
      copy_window(window);
#pragma unroll 1
      for (int word = threadIdx.x; word < words_of(window); word += kTeamThreads) {
        const float4 four = memory().maxima[word];
        use(four.x), use(four.y), use(four.z), use(four.w);
      }
    }
  }

  __device__ int words_of(int window) const { return ceil_div(min(kWindow, end_ - window), 4); }

  /// Copies the best scores of a window's tiles, unless they are there. A barrier follows.
  __device__ void copy_window(int window) {
    if (window_ == window) return;
    __syncthreads();  // the last window has been read
    window_ = window;
    const int words = words_of(window);
    const auto* from = reinterpret_cast<const uint4*>(maxima_ + window);
#pragma unroll 1
    for (int word = threadIdx.x; word < words; word += kTeamThreads) {
      copy_async(reinterpret_cast<uint4&>(memory().maxima[word]), from + word, true);
    }
    commit_copies();
    wait_for_copies<0>();
    if (static_cast<int>(threadIdx.x) == (words - 1) % kTeamThreads) {  // it has copied the last word
      float4& last = memory().maxima[words - 1];
      const int tiles = end_ - window - (words - 1) * 4;
      if (tiles < 2) last.y = kNothing;
      if (tiles < 3) last.z = kNothing;
      if (tiles < 4) last.w = kNothing;
    }
    __syncthreads();
  }

  /// Lists the near tiles of the window. A barrier follows.
  __device__ void list() {
    constexpr int kOwn = kWindow / 4 / kTeamThreads;  // words of a thread, one after the other
    const int words = words_of(window_), each = ceil_div(words, kTeamThreads);
    const int first = static_cast<int>(threadIdx.x) * each;
    uint32_t nears = 0;  // bit i: whether the ith of this thread's tiles is near
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      if (n >= each || first + n >= words) break;
      const float4 four = memory().maxima[first + n];
      nears |= ((four.x > floor) + 2u * (four.y > floor) + 4u * (four.z > floor) + 8u * (four.w > floor)) << 4 * n;
    }
    Compaction<5> kept(0);
    int to = kept.take(__popc(nears));
#pragma unroll 1
    for (; nears; nears &= nears - 1) {
      memory().tiles[to++] = static_cast<uint16_t>(first * 4 + __ffs(nears) - 1);
    }
    near_ = kept.end();
    batch_ = -1;
    __syncthreads();
  }

  /// Copies the scores of `count` near tiles of the window, unless they are there. A barrier follows.
  __device__ void copy_batch(int first, int count) {
    if (batch_ == first) return;
    __syncthreads();  // the last batch has been read
    batch_ = first;
    const auto* from = reinterpret_cast<const uint4*>(scores_);
#pragma unroll 4
    for (int i = threadIdx.x; i < count * kFours; i += kTeamThreads) {
      const auto tile = static_cast<uint32_t>(window_ + memory().tiles[first + i / kFours]);
      copy_async(reinterpret_cast<uint4&>(scores(i)), from + tile * kFours + i % kFours, true);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
  }

  const float *maxima_, *scores_;
  int batch_tiles_;
  int begin_, end_;  // the tiles that this block looks at
  bool one_window_;
  int window_ = -1;                // first tile of the window in shared memory
  int near_ = 0;                   // near tiles of the window
  int batch_ = -1;                 // first of the near tiles whose scores are in shared memory
  int first_ = 0, last_ = 0;       // the near tiles of the window that this block takes
  bool is_listed_by_all_ = false;  // by the blocks of a team, each of which has listed all
  int first_word_ = kFewWords;     // where batches begin, counted from Memory::few
};

/// Finds the near tokens of a head. If they are few, they come into the memory of the team's first block. If they are
/// many, nothing else of the result is right. All threads of the team call.
__device__ inline NearTokens find_near(Team& team, const Entmax<float>& entmax, ListScores& list) {
  const float floor = list.floor;
  const auto is_near = [=](float score) { return score > floor; };
  // One block counts the near tokens while it writes them.
  const bool alone = team.size == 1 && list.one_window();
  const bool has_many = list.has_many();
  constexpr int kMany = kFewTokens + 1;  // or more: how many does not matter
  Team::Part part{0, has_many ? kMany : 0};
  if (!alone && !(has_many && list.is_listed_by_all())) {
    int own = has_many ? kMany : 0;  // of this thread
    if (!has_many) list.for_each([&](float score) { own += is_near(score); });
    part = team.part(own);
  }
  FewTokens& few = ListScores::memory().few;
  if (part.total <= kFewTokens) {
    FewTokens& of_first = team.of(0, few);
    const int end = list.compact(part.before, is_near, [&](const ListScores::Kept& kept) {
#pragma unroll 1
      for (int i = threadIdx.x % 32; i < min(kept.count, kFewTokens - kept.begin); i += 32) {
        of_first.scores[kept.begin + i] = kept.scores[i];
        of_first.places[kept.begin + i] = kept.place(i);
      }
    });
    if (alone) part.total = end;
  }
  team.sync();
  NearTokens near{{few.scores, part.total}, few.places};
  near.set_origin(entmax, list.best, floor);
  return near;
}

}  // namespace entmaxkv::cuda
