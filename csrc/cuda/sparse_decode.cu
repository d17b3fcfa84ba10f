// sparse_decode and dense_decode on the GPU.
//   s_i = scale q . k_i + bias,  p_i = [(alpha-1) s_i - tau]_+^beta with sum p_i = 1,  out = sum_i p_i v_i
// The selected pages of a (row, KV head) are a list of tokens, cut into tiles of 32. Every key is read once per group
// of up to 8 query heads, and a value only where p > 0.
// Lists with room for at most kShort tokens: a cluster scores a list, its blocks' warps a tile each, and sends the
// scores of a head to that head's block, which finds the threshold and the output.
// Longer lists:
//   1. score: the tiles of all lists are divided evenly over a fixed grid, whatever the lengths; a warp scores a tile
//      for all heads of the group. A token is alive while its score is within beta, in s, of the best that the block
//      knows of its head (entmax.h): one bit says so, and only then is the score written.
//   2. solve: a cluster per (row, query head) takes the scores that are alive, in the order of the list, finds the
//      threshold, and adds up the values of the tokens with p > 0. Few tokens are left to one block.
// What is alive depends on timing, but a token that has weight always is, and no sum depends on the others or on other
// rows. So with the same room in its table a row always has the same bits.
#include "head_output.cuh"
#include "kernels.h"
#include "share.cuh"
#include "softmax_decode.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kBlocks = 2;  // of a team's threads, that share a multiprocessor

// Short lists.

template <typename T, typename Layout>
using ShortRing = Ring<T, Layout, kThreads / 32>;

/// Heads of a group whose scores one block takes.
int heads_of_block(const Sizes& sizes, int blocks) { return ceil_div(std::min(sizes.group, kTileHeads), blocks); }

template <typename T, typename Layout>
__global__ void __launch_bounds__(kThreads, kBlocks) decode_short(SparseDecode op, int capacity, bool vectors) {
  take_turn();
  using Slots = ShortRing<T, Layout>;
  __shared__ Queries<T, Layout> s_q;
  __shared__ HeldTokens s_held;
  __shared__ Chunk<T> s_chunk;
  float* s_scores = reinterpret_cast<float*>(dynamic_shared()) + Slots::kBytes / 4;  // [heads_of_block, capacity]
  __shared__ cluster::Mailbox s_box;
  if (threadIdx.x == 0) s_box.open();
  cluster::arrive();
  const int64_t row = blockIdx.z;
  const HeadGroup group(op, blockIdx.y);
  const QueryLoad<T, Layout, kThreads> queries(op.q, row, group, op.head_dim);
  const TokenList list(op, row, group.kv_head);
  const LaneScoring scoring(op, group);
  const int warp = threadIdx.x / 32, rank = cluster::rank(), blocks = cluster::size();
  const int first = rank * Slots::kWarps + warp, step = blocks * Slots::kWarps;
  const auto tile = [=](int n) { return first + n * step; };
  const int tiles = warp < Slots::kWarps ? max(0, ceil_div(list.tiles() - first, step)) : 0;
  Products scores;
  auto stream = list.keys<Slots>(op.k_pages, group.kv_head, op.head_dim, Upto{tiles}, tile);
  stream.run(
      [&] {
        queries.store([&](int h, int d, float q) { s_q.set(h, d, q); });
        __syncthreads();
        cluster::wait();  // all blocks are there
      },
      [&](int, const Slot<T, Layout>& slot) {
        scores = {};
        multiply(slot, s_q, group.heads, scores);
      },
      [&](int n) {
        scoring.score(list, tile(n), scores);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int h = Products::head(j);
          if (h >= group.heads) continue;
          float* to = s_scores + h / blocks * capacity + tile(n) * kTileRows + Products::row(0);
          s_box.send(h % blocks, *reinterpret_cast<float4*>(to),
                     float4{scores.of[0][j], scores.of[1][j], scores.of[2][j], scores.of[3][j]});
        }
      });
  const int to = threadIdx.x;
  if (to < min(blocks, group.heads)) {
    const int left = list.tiles() % step - rank * Slots::kWarps;
    const int own_tiles = list.tiles() / step * Slots::kWarps + max(0, min(left, Slots::kWarps));
    const int its_heads = ceil_div(group.heads - to, blocks);
    s_box.announce(to, own_tiles * its_heads * kTileRows * static_cast<int>(sizeof(float)));
  }
  if (rank >= group.heads) return;
  s_box.wait(0);
  for (int h = rank; h < group.heads; h += blocks) {
    const int head = group.first_head + h;
    const Entmax<double> entmax(op.alpha.of(head));
    auto* s_places = reinterpret_cast<int32_t*>(dynamic_shared());  // where the keys were
    Team team = Team::block();
    const NearTokens near =
        near_of_short(team, entmax, list.tokens, s_scores + h / blocks * capacity, s_places, s_held);
    HeadOutput<T>{op, list, row, head, group.kv_head, vectors}.write(team, entmax, near, s_chunk);
    __syncthreads();  // before the next head
  }
}

// Long lists.

/// Results between the launches, per (row, query head).
struct Scratch {
  static constexpr int kBests = 128;
  static constexpr int kApart = 64;  // so that not all of memory's traffic is for one line

  int capacity;     // tokens of the longest list, in whole tiles
  float* scores;    // [batch, q_heads, capacity] where alive
  int32_t* places;  // [batch, q_heads, capacity] in the list, of the tokens that can have weight
  uint32_t* alive;  // [batch, q_heads, capacity / 32]
  // [batch, groups, kApart] of which the first: tiles that warps have taken; zeros before step 1
  uint32_t* taken;
  // [batch, q_heads, kBests] best scores of different parts of the list, ordered; zeros before step 1. Null: blocks do
  // not tell each other, as is best for lists of a few selected pages.
  uint32_t* bests;

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
    take(bests, op.selection ? 0 : kBests);
    take(scores, capacity);
    take(places, capacity);
    take(alive, tiles());
    if (op.selection) bests = nullptr;
    return bytes;
  }
};

/// Where a block of kBlock threads can help when its list has been taken, by tiles_of(list) and taken_of(list): some
/// list with many tiles left, another one for each block, or one that no block has begun; -1 if there is none. All
/// threads call.
template <int kBlock, typename Tiles, typename Taken>
__device__ int list_in_need(int lists, Tiles tiles_of, Taken taken_of) {
  constexpr int kWorthIt = 16;  // tiles
  __shared__ unsigned long long s_most;
  __syncthreads();  // the one of an earlier call has been read
  if (threadIdx.x == 0) s_most = 0;
  __syncthreads();
  unsigned long long most = 0;
  for (int list = threadIdx.x; list < lists; list += kBlock) {
    const int taken = taken_of(list), left = tiles_of(list) - taken;
    if (left < (taken > 0 ? kWorthIt : 1)) continue;
    const unsigned long long weight = 8 + (list * 5 + blockIdx.x * 3) % 8;
    most = max(most, left * weight << 32 | static_cast<unsigned>(list));
  }
  if (most > 0) atomicMax(&s_most, most);
  __syncthreads();
  return s_most > 0 ? static_cast<int>(s_most & 0xffffffffu) : -1;
}

/// The tiles of a list that a warp takes: runs of them, each when no other warp has. They are asked for one run ahead.
class Tickets {
 public:
  static constexpr int kHeld = 8;  // of the latest
  static constexpr int kMostRun = 4;

  __device__ Tickets(uint32_t* taken, int tiles, int* s_held)
      : taken_(taken), tiles_(tiles), run_(max(1, min(tiles / 2048, kMostRun))), s_held_(s_held) {
    ask();
  }

  /// Whether the warp has an nth tile. All lanes call, with no n more than one above the last.
  __device__ bool more(int n) {
    if (n == known_) {
      if (left_ == 0) {
        next_ = __shfl_sync(kAllLanes, asked_, 0);
        left_ = run_;
        if (next_ < tiles_) ask();
      }
      if (threadIdx.x % 32 == 0) s_held_[n % kHeld] = next_;
      __syncwarp();
      ++known_, ++next_, --left_;
    }
    return tile(n) < tiles_;
  }

  __device__ int tile(int n) const { return s_held_[n % kHeld]; }

 private:
  __device__ void ask() {
    if (threadIdx.x % 32 == 0) asked_ = static_cast<int>(atomicAdd(taken_, static_cast<uint32_t>(run_)));
  }

  uint32_t* taken_;
  int tiles_, run_;
  int* s_held_;
  int known_ = 0, asked_ = 0, next_ = 0, left_ = 0;
};

/// Which tokens of a group's heads are alive, by a block: its warps share the best scores that they have seen, and
/// below which score no token of a head has weight. From time to time they tell the other blocks their best, through
/// memory that all multiprocessors ask for: one line of it, asked before every tile, cost 60 of 600 us at 1M tokens on
/// an H200.
class Living {
 public:
  struct Shared {
    uint32_t best[kTileHeads], least[kTileHeads];  // scores, ordered
  };

  __device__ Living(const SparseDecode& op, const Scratch& scratch, int64_t row, const HeadGroup& group, Shared& shared)
      : scratch_(scratch), group_(group), first_(row * op.q_heads + group.first_head), alpha_(op.alpha), s_(shared) {
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
    if (!scratch_.bests || !(last || (n & (n + 1)) == 0)) return;
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
  __device__ void keep(int tile, int tokens, const Products& scores) const {
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
  }

 private:
  __device__ uint32_t* bests(int h) const { return scratch_.bests + (first_ + h) * Scratch::kBests; }

  /// Takes all blocks' best scores into account. Of `tokens` of them that are at most `below` beneath the best, the
  /// threshold is no lower than where they have a mass of 1, were they all down there. All lanes call.
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
  int64_t first_;  // head of the group, rows counted in
  const Alpha& alpha_;
  Shared& s_;
  float reach_[2];                        // how far below the best score a token is alive
  float best_[2] = {kNothing, kNothing};  // of this lane's rows
  uint32_t told_[2] = {0, 0};             // of those
};

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * ScanRing<T, Layout>::kWarps, kScanOccupancy<Layout>)
    score(SparseDecode op, Scratch scratch) {
  take_turn();
  using Slots = ScanRing<T, Layout>;
  __shared__ Queries<T, Layout> s_q;
  __shared__ Living::Shared s_living;
  __shared__ int s_tickets[Slots::kWarps][Tickets::kHeld];
  constexpr int kBlock = 32 * Slots::kWarps;
  const int groups = HeadGroup::per_row(op), lists = op.batch * groups;
  const auto tiles_of = [&](int index) {
    return TokenList(op, index / groups, HeadGroup(op, index % groups).kv_head).tiles();
  };
  const auto taken_of = [&](int index) {
    return static_cast<int>(__ldcg(scratch.taken + int64_t{index} * Scratch::kApart));
  };
  const auto share = Share::of_block<kBlock>(lists, tiles_of);
  for (int index = share.items > 0 ? share.list : -1; index >= 0;
       index = list_in_need<kBlock>(lists, tiles_of, taken_of)) {
    const int64_t row = index / groups;
    const HeadGroup group(op, index % groups);
    const TokenList list(op, row, group.kv_head);
    Tickets tickets(scratch.taken + int64_t{index} * Scratch::kApart, list.tiles(), s_tickets[threadIdx.x / 32]);
    const auto more = [&](int n) { return tickets.more(n); };
    const auto tile = [&](int n) { return tickets.tile(n); };
    const QueryLoad<T, Layout, kBlock> queries(op.q, row, group, op.head_dim);
    const LaneScoring scoring(op, group);
    Living living(op, scratch, row, group, s_living);
    Products scores;
    auto stream = list.keys<Slots>(op.k_pages, group.kv_head, op.head_dim, more, tile);
    stream.run(
        [&] {
          __syncthreads();  // every warp is done with the last group
          queries.store([&](int h, int d, float q) { s_q.set(h, d, q); });
          living.begin();
          __syncthreads();
        },
        [&](int, const Slot<T, Layout>& slot) {
          scores = {};
          multiply(slot, s_q, group.heads, scores);
        },
        [&](int n) {
          scoring.score(list, tile(n), scores);
          const int tokens = list.tokens - tile(n) * kTileRows;
          living.learn(tokens, scores);
          living.exchange(n, !tickets.more(n + 1));
          living.keep(tile(n), tokens, scores);
        });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) solve(SparseDecode op, Scratch scratch, bool vectors) {
  take_turn();
  __shared__ HeldTokens s_held;
  __shared__ Chunk<T> s_chunk;
  const int64_t row = blockIdx.z;
  const int head = blockIdx.y, kv_head = head / op.group;
  const int64_t at = row * op.q_heads + head;
  const TokenList list(op, row, kv_head);
  Team team = Team::cluster();
  const Entmax<double> entmax(op.alpha.of(head));
  float best = kNothing;
  if (scratch.bests) {
    const uint32_t own = threadIdx.x < Scratch::kBests ? scratch.bests[at * Scratch::kBests + threadIdx.x] : 0;
    best = largest<kThreads>(own ? from_ordered(own) : kNothing);
  }
  const NearTokens near =
      near_of_alive(team, entmax, best, scratch.alive + at * scratch.tiles(), list.tiles(),
                    scratch.scores + at * scratch.capacity, scratch.places + at * scratch.capacity, s_held);
  if (near.are_few() && team.rank > 0) return;
  HeadOutput<T>{op, list, row, head, kv_head, vectors}.write(team, entmax, near, s_chunk);
}

/// Without clusters, one block would have a short list to itself.
bool is_short(const SparseDecode& op) { return capacity_of(op) <= kShort && is_hopper_or_later(); }

/// alpha = 1 in every head: all tokens have weight.
bool is_softmax(const SparseDecode& op) { return !op.alpha.per_head && Entmax<double>(op.alpha.value).is_softmax(); }

}  // namespace

int64_t workspace_bytes(const SparseDecode& op) {
  if (is_softmax(op)) return softmax_workspace_bytes(op);
  return is_short(op) ? 0 : Scratch{capacity_of(op)}.place(op, nullptr);
}

void sparse_decode(const SparseDecode& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  if (is_softmax(op)) return softmax_decode(op, workspace, stream);
  Scratch scratch{capacity_of(op)};
  scratch.place(op, workspace);
  const char* name = op.selection ? "sparse_decode" : "dense_decode";
  const bool key_vectors = in_vectors(op.k_pages, op.dtype, op.head_dim);
  const bool value_vectors = in_vectors(op.v_pages, op.dtype, op.head_dim);
  const bool short_lists = is_short(op);
  const int groups = HeadGroup::per_row(op), most_blocks = cluster::most_blocks();
  if (!short_lists) {
    const int words = Scratch::kApart + (scratch.bests ? Scratch::kBests : 0);
    check(name, cudaMemsetAsync(scratch.taken, 0, int64_t{op.batch} * op.q_heads * words * 4, stream));
  }
  dispatch_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_layout(op.head_dim, key_vectors, [&](auto layout) {
      using Layout = decltype(layout);
      if (short_lists) {
        int blocks = most_blocks;  // fewer, if they would not all find room at once
        while (blocks > 2 && int64_t{blocks} * groups * op.batch > multiprocessors()) blocks /= 2;
        const int shared = ShortRing<T, Layout>::kBytes + heads_of_block(op, blocks) * scratch.capacity * 4;
        launch(name, decode_short<T, Layout>, {dim3(blocks, groups, op.batch), kThreads, blocks, shared}, stream, op,
               scratch.capacity, value_vectors);
      } else {
        using Slots = ScanRing<T, Layout>;
        launch(name, score<T, Layout>,
               {dim3(kScanBlocks<Layout> * multiprocessors()), 32 * Slots::kWarps, 1, Slots::kBytes}, stream, op,
               scratch);
      }
    });
    if (!short_lists) {
      constexpr int kTokensOfBlock = 64 << 10;
      int blocks = 1;
      while (blocks < most_blocks && blocks * kTokensOfBlock < scratch.capacity) blocks *= 2;
      launch(name, solve<T>, {dim3(blocks, op.q_heads, op.batch), kThreads, blocks}, stream, op, scratch,
             value_vectors);
    }
  });
}

}  // namespace entmaxkv::cuda
