// sparse_decode and dense_decode on the GPU.
//   s_i = scale q . k_i + bias,  p_i = [(alpha-1) s_i - tau]_+^beta with sum p_i = 1,  out = sum_i p_i v_i
// The selected pages of a (row, KV head) are a list of tokens, cut into tiles of 32. Every key is read once per group
// of up to 8 query heads, and a value only where p > 0.
// Lists with room for at most kShort tokens: a cluster scores a list, its blocks' warps a tile each, and sends the
// scores of a head to that head's block, which finds the threshold and the output.
// Longer lists:
//   1. score: the blocks of a fixed grid divide the lists, whatever their lengths; a warp scores a tile for all heads
//      of the group. A token is alive while it can have weight beside those that the block knows of (living.cuh): one
//      bit says so, and only then is the score written.
//   2. solve: a block or a cluster per (row, query head) takes the scores that are alive, in the order of the list,
//      finds the threshold, and adds up the values of the tokens with p > 0. Few tokens are left to one block.
// What is alive depends on timing, but a token above the level from which the threshold is sought (near_tokens.cuh)
// always is, and no sum depends on the others, on other rows, or on how many blocks there are for a head. So a row
// always has the same bits.
#include "common/work_split.cuh"
#include "kernels.h"
#include "sparse_decode/candidates.cuh"
#include "sparse_decode/head_output.cuh"
#include "sparse_decode/softmax_decode.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kBlocks = 2;  // of a team's threads, that share a multiprocessor

// Short lists.

template <typename T, typename Layout>
using ShortRing = Ring<T, Layout, kTeamThreads / 32>;

/// Blocks of a cluster for each short list: fewer, if they would not all find room at once.
int blocks_of_short(const SparseDecode& op) {
  int blocks = cluster::most_blocks();
  while (blocks > 2 && int64_t{blocks} * HeadGroup::per_row(op) * op.batch > multiprocessors()) blocks /= 2;
  return blocks;
}

/// What a block needs for the scores that it takes.
int score_bytes(const SparseDecode& op, int blocks) {
  return ceil_div(std::min(op.group, kTileHeads), blocks) * capacity_of(op) * static_cast<int>(sizeof(float));
}

template <typename T, typename Layout>
__global__ void __launch_bounds__(kTeamThreads, kBlocks) decode_short(SparseDecode op, int capacity, bool vectors) {
  take_turn();
  using Slots = ShortRing<T, Layout>;
  __shared__ Queries<T, Layout> s_q;
  __shared__ NearMemory s_near;
  float* s_scores = reinterpret_cast<float*>(dynamic_shared()) + Slots::kBytes / 4;  // [its heads, capacity]
  __shared__ cluster::Mailbox s_box;
  if (threadIdx.x == 0) s_box.open();
  cluster::arrive();
  const int64_t row = blockIdx.z;
  const HeadGroup group(op, blockIdx.y);
  const QueryLoad<T, Layout, kTeamThreads> queries(op.q, row, group, op.head_dim);
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
    auto& s_chunk = *reinterpret_cast<Chunk<T>*>(s_places + kShort);
    static_assert(kShort * sizeof(int32_t) + sizeof(Chunk<T>) <= Slots::kBytes);
    Team team = Team::block();
    const NearTokens near =
        near_of_short(team, entmax, list.tokens, s_scores + h / blocks * capacity, s_places, s_near.few);
    HeadOutput<T>{op, list, row, head, group.kv_head, vectors}.write(team, entmax, near, s_near, s_chunk);
    __syncthreads();  // before the next head
  }
}

// Long lists.

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
  const auto work = WorkSplit::of_block<kBlock>(lists, tiles_of);
  for (int index = work.items > 0 ? work.list : -1; index >= 0;
       index = list_in_need<kBlock>(lists, tiles_of, taken_of)) {
    const int64_t row = index / groups;
    const HeadGroup group(op, index % groups);
    const TokenList list(op, row, group.kv_head);
    Tickets tickets(scratch.taken + int64_t{index} * Scratch::kApart, list.tiles(), s_tickets[threadIdx.x / 32]);
    const auto more = [&](int n) { return tickets.more(n); };
    const auto tile = [&](int n) { return tickets.tile(n); };
    const QueryLoad<T, Layout, kBlock> queries(op.q, row, group, op.head_dim);
    const LaneScoring scoring(op, group);
    Living living(op, scratch, row, group, tell_bests(op, list), s_living);
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
    living.end();
  }
}

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, kBlocks) solve(SparseDecode op, Scratch scratch, bool vectors) {
  take_turn();
  __shared__ NearMemory s_near;
  __shared__ Chunk<T> s_chunk;
  const int64_t row = blockIdx.z;
  const int head = blockIdx.y, kv_head = head / op.group;
  const int64_t at = row * op.q_heads + head;
  const TokenList list(op, row, kv_head);
  constexpr int kLong = 64 << 10;  // tokens of lists that take a block long to look through, whatever is alive
  const bool together = scratch.living[at] > kFewTokens || list.tokens > kLong;
  Team team = Team::blocks(together ? min(parts_of(list.tokens), cluster::size()) : 1);
  if (team.rank >= team.size) return;
  const Entmax<double> entmax(op.alpha.of(head));
  float best = kNothing;
  if (tell_bests(op, list)) {
    const uint32_t own = threadIdx.x < Scratch::kBests ? scratch.bests[at * Scratch::kBests + threadIdx.x] : 0;
    best = largest<kTeamThreads>(own ? from_ordered(own) : kNothing);
  }
  const NearTokens near =
      near_of_alive(team, entmax, best, scratch.alive + at * scratch.tiles(), list.tiles(),
                    scratch.scores + at * scratch.capacity, scratch.places + at * scratch.capacity, s_near);
  if (near.are_few() && team.rank > 0) return;
  HeadOutput<T>{op, list, row, head, kv_head, vectors}.write(team, entmax, near, s_near, s_chunk);
}

/// Without clusters, one block would have a short list to itself; and some GPUs have no room for the scores of several
/// heads in a block.
bool is_short(const SparseDecode& op) {
  constexpr int kOthers = 19 << 10;  // bytes of a block besides rows and scores, at most
  if (!is_hopper_or_later() || capacity_of(op) > kShort) return false;
  const int bytes = kRingBytes + score_bytes(op, blocks_of_short(op)) + kOthers;
  return bytes <= device_property(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

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
  if (!short_lists) {
    const int words = Scratch::kApart + Scratch::kBests + 1;
    check(name, cudaMemsetAsync(scratch.taken, 0, int64_t{op.batch} * op.q_heads * words * 4, stream));
  }
  dispatch_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_layout(op.head_dim, key_vectors, [&](auto layout) {
      using Layout = decltype(layout);
      if (short_lists) {
        const int blocks = blocks_of_short(op), shared = ShortRing<T, Layout>::kBytes + score_bytes(op, blocks);
        launch(name, decode_short<T, Layout>,
               {dim3(blocks, HeadGroup::per_row(op), op.batch), kTeamThreads, blocks, shared}, stream, op,
               scratch.capacity, value_vectors);
      } else {
        using Slots = ScanRing<T, Layout>;
        launch(name, score<T, Layout>,
               {dim3(kScanBlocks<Layout> * multiprocessors()), 32 * Slots::kWarps, 1, Slots::kBytes}, stream, op,
               scratch);
      }
    });
    if (!short_lists) {
      const int64_t most = 2 * kBlocks * multiprocessors();  // twice as many as run together: some end right away
      int blocks = std::min(parts_of(scratch.capacity), cluster::most_blocks());
      while (blocks > 1 && int64_t{blocks} * op.q_heads * op.batch > most) blocks /= 2;
      launch(name, solve<T>, {dim3(blocks, op.q_heads, op.batch), kTeamThreads, blocks, AliveTokens::kBytes}, stream,
             op, scratch, value_vectors);
    }
  });
}

}  // namespace entmaxkv::cuda
