// Finds the candidates of long lists while their tokens are scored: the tokens that no bound known so far rules out.
#pragma once

#include "near_tokens.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

/// Intermediate results in global memory that `score` writes and `solve` reads.
struct Scratch {
  static constexpr int kBests = 128;
  static constexpr int kCounterStride = 64;  // words between counters, so that they lie in different cache lines

  int capacity;          // tokens of the longest list, in whole tiles
  float* scores;         // [batch, q_heads, capacity] by place in the list; written for candidates only
  int32_t* places;       // [batch, q_heads, capacity] places in the list of candidates, and then of near tokens
  uint32_t* candidates;  // [batch, q_heads, capacity / 32] bit i of word w: whether token 32 w + i is a candidate
  // Zeros before step 1:
  uint32_t* taken;             // [batch, groups, kCounterStride] first word of each: tiles that warps have taken
  uint32_t* bests;             // [batch, q_heads, kBests] best scores of different parts of the list, as ordered()
  uint32_t* candidate_counts;  // [batch, q_heads] number of candidates

  __host__ __device__ int tiles() const { return capacity / kTileRows; }

  /// Places the arrays one after the other from `memory` on. Returns how many bytes they take.
  int64_t place(const SparseDecode& op, void* memory) {
    const int64_t heads = int64_t{op.batch} * op.q_heads;
    int64_t bytes = 0;
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(memory) + bytes);
      bytes += heads * count * 4;
    };
    take(taken, kCounterStride);  // a row has at most as many groups as heads
    take(bests, kBests);
    take(candidate_counts, 1);
    take(scores, capacity);
    take(places, capacity);
    take(candidates, tiles());
    return bytes;
  }
};

/// Returns whether blocks exchange their best scores. For a list of few selected tokens that costs more than it saves.
__device__ inline bool exchange_bests(const SparseDecode& op, const TokenList& list) {
  return !op.selection || list.tokens > kFewTokens;
}

/// Decides for a block which tokens of a list are candidates of the heads of a group, tile by tile. The warps keep two
/// values per head in shared memory: the best score so far, and a floor below which no token has weight. They exchange
/// best scores with other blocks ever more rarely, as this goes through memory that all multiprocessors access
/// (bench/NOTES.md). For each tile call learn, exchange and write_candidates.
class CandidateScan {
 public:
  struct Shared {
    uint32_t best[kTileHeads], floor[kTileHeads];  // scores, as ordered()
  };

  __device__ CandidateScan(const SparseDecode& op, const Scratch& scratch, int64_t row, const HeadGroup& group,
                           bool exchanges, Shared& shared)
      : scratch_(scratch),
        group_(group),
        exchanges_(exchanges),
        first_(row * op.q_heads + group.first_head),
        alpha_(op.alpha),
        s_(shared) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int head = group.first_head + min(Products::head(j), group.heads - 1);
      reach_[j] = reach_of(Entmax<double>(op.alpha.of(head)));
    }
  }

  /// Resets the shared memory. All threads call before the first tile, and then __syncthreads.
  __device__ void begin() const {
    if (threadIdx.x < kTileHeads) s_.best[threadIdx.x] = s_.floor[threadIdx.x] = 0;
  }

  /// Raises the best scores by the scores of the first `tokens` tokens of a tile. All lanes call.
  __device__ void learn(int tokens, const Products& scores) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (Products::row(i) < tokens) best_[j] = larger(best_[j], scores.of[i][j]);
      }
      const int h = Products::head(j);
      if (h < group_.heads && ordered(best_[j]) > s_.best[h]) atomicMax(&s_.best[h], ordered(best_[j]));
    }
    __syncwarp();
  }

  /// After this warp's nth tile: if n + 1 is a power of two, or it is the last tile, sends this lane's best scores to
  /// other blocks; at some of these n also calls read_bests. All lanes call.
  __device__ void exchange(int n, bool last) {
    if (!exchanges_ || !(last || (n & (n + 1)) == 0)) return;
    const int warps = blockDim.x / 32, warp = blockIdx.x * warps + threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int h = Products::head(j);
      if (h >= group_.heads || ordered(best_[j]) <= sent_[j]) continue;
      sent_[j] = ordered(best_[j]);
      atomicMax(bests(h) + (8 * warp + lane / 4) % Scratch::kBests, sent_[j]);
    }
    if (n == 0 || (!last && __popc(n) % warps == warp % warps)) read_bests();
  }

  /// Writes the scores of a tile's candidates, and the bits that say which tokens are candidates. All lanes call.
  __device__ void write_candidates(int tile, int tokens, const Products& scores) {
    const int lane = threadIdx.x % 32;
    bool candidate[4][2], any = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int h = Products::head(j);
      const float floor = fmaxf(__fsub_rd(from_ordered(s_.best[h]), reach_[j]), from_ordered(s_.floor[h]));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // A NaN stays a candidate.
        candidate[i][j] = h < group_.heads && Products::row(i) < tokens && !(scores.of[i][j] < floor);
        any |= candidate[i][j];
      }
    }
    uint32_t mask = 0;  // the candidates of head `lane`
    if (__ballot_sync(kAllLanes, any)) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t all = __ballot_sync(kAllLanes, candidate[i][j]);  // bit 4 g + p: row 4 g + i, head 2 p + j
          if (lane % 2 == j) mask |= (all >> lane / 2 % 4 & 0x11111111u) << i;
          if (candidate[i][j]) {
            scratch_.scores[(first_ + Products::head(j)) * scratch_.capacity + tile * kTileRows + Products::row(i)] =
                scores.of[i][j];
          }
        }
      }
    }
    if (lane < group_.heads) scratch_.candidates[(first_ + lane) * scratch_.tiles() + tile] = mask;
    count_ += __popc(mask);
  }

  /// Adds this warp's number of candidates to the heads' counts. All lanes call after the last tile.
  __device__ void end() const {
    const int lane = threadIdx.x % 32;
    if (lane < group_.heads && count_ > 0) atomicAdd(scratch_.candidate_counts + first_ + lane, count_);
  }

 private:
  __device__ uint32_t* bests(int h) const { return scratch_.bests + (first_ + h) * Scratch::kBests; }

  /// Raises the best scores and floors by the best scores of all blocks. Let n of these be at most `depth` below the
  /// best. If all n were exactly that deep, their mass would be 1 at some threshold: the true threshold is at least
  /// that one. The floor is lower by kMargin: the solver's level (class Levels) may be two steps, plus the effect of
  /// kEnough, below the threshold. Every token above that level must be a candidate. All lanes call.
  __device__ void read_bests() const {
    constexpr int kHeads = 4, kLanes = 32 / kHeads;  // heads at once, and lanes for each
    constexpr int kOwn = Scratch::kBests / kLanes / 4;
    constexpr int kDepths = 4, kBits = 8;
    constexpr float kDepth = 1.0f / 8, kMargin = 1e-3f + 2 * Levels::kStep;  // in units of beta
    static_assert(Scratch::kBests < 1 << kBits);
    const int lane = threadIdx.x % 32;
    for (int first = 0; first < group_.heads; first += kHeads) {
      const int h = min(first + lane / kLanes, group_.heads - 1);
      const Entmax<float> entmax{Entmax<double>(alpha_.of(group_.first_head + h))};
      uint4 words[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        words[i] = __ldcg(reinterpret_cast<const uint4*>(bests(h)) + i * kLanes + lane % kLanes);
      uint32_t best = 0;
#pragma unroll
      for (const uint4& word : words) best = max(best, max(max(word.x, word.y), max(word.z, word.w)));
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) best = max(best, shuffle_xor(best, distance));
      const float top = from_ordered(best);
      uint32_t least[kDepths], counts = 0;
#pragma unroll
      for (int depth = 0; depth < kDepths; ++depth)
        least[depth] = ordered(-__fsub_rd((depth + 1) * kDepth * entmax.beta, top));
#pragma unroll
      for (const uint4& word : words) {
        for (const uint32_t key : {word.x, word.y, word.z, word.w}) {
#pragma unroll
          for (int depth = 0; depth < kDepths; ++depth) counts += key >= least[depth] ? 1u << depth * kBits : 0;
        }
      }
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) counts += shuffle_xor(counts, distance);
      float threshold = -1;
#pragma unroll
      for (int depth = 0; depth < kDepths; ++depth) {
        const auto tokens = static_cast<float>(counts >> depth * kBits & ((1 << kBits) - 1));
        threshold = fmaxf(threshold, -(depth + 1) * kDepth - __powf(tokens, -entmax.gap));
      }
      if (lane % kLanes == 0) {
        atomicMax(&s_.best[h], best);
        const float safe = __fsub_rd(top, (kMargin - threshold) * entmax.beta);
        if (Weights::are_in_float(entmax) && safe > kNothing) atomicMax(&s_.floor[h], ordered(safe));
      }
    }
    __syncwarp();
  }

  const Scratch& scratch_;
  const HeadGroup& group_;
  bool exchanges_;
  int64_t first_;  // row * q_heads + first head of the group
  const Alpha& alpha_;
  Shared& s_;
  float reach_[2];                        // a token this far below the best score has no weight
  float best_[2] = {kNothing, kNothing};  // best scores of this lane's rows
  uint32_t sent_[2] = {0, 0};             // the best scores that were sent last, as ordered()
  uint32_t count_ = 0;                    // this warp's candidates of head `lane`
};

}  // namespace entmaxkv::cuda
