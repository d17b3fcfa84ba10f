// Which tokens of long lists can have weight, as far as it is known while they are scored.
#pragma once

#include "near_tokens.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

/// Results between the launches, per (row, query head).
struct Scratch {
  static constexpr int kBests = 128;
  static constexpr int kApart = 64;  // so that not all of memory's traffic is for one line

  int capacity;     // tokens of the longest list, in whole tiles
  float* scores;    // [batch, q_heads, capacity] where alive
  int32_t* places;  // [batch, q_heads, capacity] in the list, of the tokens that can have weight
  uint32_t* alive;  // [batch, q_heads, capacity / 32]
  // Zeros before step 1:
  uint32_t* taken;   // [batch, groups, kApart] of which the first: tiles that warps have taken
  uint32_t* bests;   // [batch, q_heads, kBests] best scores of different parts of the list, ordered
  uint32_t* living;  // [batch, q_heads] tokens alive

  __host__ __device__ int tiles() const { return capacity / kTileRows; }

  /// Lays the arrays out from `memory` on, and says how many bytes they take.
  int64_t place(const SparseDecode& op, void* memory) {
    const int64_t heads = int64_t{op.batch} * op.q_heads;
    int64_t bytes = 0;
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(memory) + bytes);
      bytes += heads * count * 4;
    };
    take(taken, kApart);  // there are no more groups than heads
    take(bests, kBests);
    take(living, 1);
    take(scores, capacity);
    take(places, capacity);
    take(alive, tiles());
    return bytes;
  }
};

/// Whether blocks tell each other their best scores: where few tokens are selected that takes longer than it saves.
__device__ inline bool tell_bests(const SparseDecode& op, const TokenList& list) {
  return !op.selection || list.tokens > kFewTokens;
}

/// Which tokens of a group's heads are alive, by a block: its warps share the best scores that they have seen, and
/// below which score no token of a head has weight. They tell the other blocks their best only from time to time: it
/// goes through memory that all multiprocessors ask for (bench/NOTES.md).
class Living {
 public:
  struct Shared {
    uint32_t best[kTileHeads], least[kTileHeads];  // scores, ordered
  };

  __device__ Living(const SparseDecode& op, const Scratch& scratch, int64_t row, const HeadGroup& group, bool tells,
                    Shared& shared)
      : scratch_(scratch),
        group_(group),
        tells_(tells),
        first_(row * op.q_heads + group.first_head),
        alpha_(op.alpha),
        s_(shared) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int head = group.first_head + min(Products::head(j), group.heads - 1);
      reach_[j] = reach_of(Entmax<double>(op.alpha.of(head)));
    }
  }

  /// Before the first tile. All threads call, and then __syncthreads.
  __device__ void begin() const {
    if (threadIdx.x < kTileHeads) s_.best[threadIdx.x] = s_.least[threadIdx.x] = 0;
  }

  /// Takes the scores of a tile into account, of its first `tokens` tokens. All lanes call.
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

  /// Tells the other blocks, after the nth of this warp's tiles ever more rarely, and learns from them. All lanes call.
  __device__ void exchange(int n, bool last) {
    if (!tells_ || !(last || (n & (n + 1)) == 0)) return;
    const int warps = blockDim.x / 32, warp = blockIdx.x * warps + threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int h = Products::head(j);
      if (h >= group_.heads || ordered(best_[j]) <= told_[j]) continue;
      told_[j] = ordered(best_[j]);
      atomicMax(bests(h) + (8 * warp + lane / 4) % Scratch::kBests, told_[j]);
    }
    if (n == 0 || (!last && __popc(n) % warps == warp % warps)) hear();
  }

  /// Writes the scores of a tile that are alive, and which they are. All lanes call.
  __device__ void keep(int tile, int tokens, const Products& scores) {
    const int lane = threadIdx.x % 32;
    bool lives[4][2], any = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int h = Products::head(j);
      const float least = fmaxf(__fsub_rd(from_ordered(s_.best[h]), reach_[j]), from_ordered(s_.least[h]));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        lives[i][j] = h < group_.heads && Products::row(i) < tokens && !(scores.of[i][j] < least);  // NaN lives
        any |= lives[i][j];
      }
    }
    uint32_t alive = 0;  // of head `lane`
    if (__ballot_sync(kAllLanes, any)) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t all = __ballot_sync(kAllLanes, lives[i][j]);  // bit 4 g + p: row 4 g + i, head 2 p + j
          if (lane % 2 == j) alive |= (all >> lane / 2 % 4 & 0x11111111u) << i;
          if (lives[i][j]) {
            scratch_.scores[(first_ + Products::head(j)) * scratch_.capacity + tile * kTileRows + Products::row(i)] =
                scores.of[i][j];
          }
        }
      }
    }
    if (lane < group_.heads) scratch_.alive[(first_ + lane) * scratch_.tiles() + tile] = alive;
    count_ += __popc(alive);
  }

  /// After the last tile. All lanes call.
  __device__ void end() const {
    const int lane = threadIdx.x % 32;
    if (lane < group_.heads && count_ > 0) atomicAdd(scratch_.living + first_ + lane, count_);
  }

 private:
  __device__ uint32_t* bests(int h) const { return scratch_.bests + (first_ + h) * Scratch::kBests; }

  /// Takes all blocks' best scores into account. Of those at most some depth beneath the best, the threshold is no
  /// lower than where they have a mass of 1, were they all down there. Levels may stand two steps and its kEnough below
  /// the threshold, and all that is above them must live: hence kMargin. All lanes call.
  __device__ void hear() const {
    constexpr int kHeads = 4, kLanes = 32 / kHeads;  // at once, and of each
    constexpr int kOwn = Scratch::kBests / kLanes / 4;
    constexpr int kDepths = 4, kBits = 8;
    constexpr float kDepth = 1.0f / 8, kMargin = 1e-3f + 2 * Levels::kStep;  // of beta
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
        if (Weights::are_in_float(entmax) && safe > kNothing) atomicMax(&s_.least[h], ordered(safe));
      }
    }
    __syncwarp();
  }

  const Scratch& scratch_;
  const HeadGroup& group_;
  bool tells_;
  int64_t first_;  // head of the group, rows counted in
  const Alpha& alpha_;
  Shared& s_;
  float reach_[2];                        // how far below the best score a token is alive
  float best_[2] = {kNothing, kNothing};  // of this lane's rows
  uint32_t told_[2] = {0, 0};             // of those
  uint32_t count_ = 0;                    // tokens alive of head `lane`
};

}  // namespace entmaxkv::cuda
