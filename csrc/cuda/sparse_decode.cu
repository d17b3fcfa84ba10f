// sparse_decode and dense_decode on the GPU.
//   s_i = scale q . k_i + bias,  p_i = [(alpha-1) s_i - tau]_+^beta with sum p_i = 1,  out = sum_i p_i v_i
//   q, out [batch, q_heads, head_dim], k_pages, v_pages [pages, kv_heads, page_size, head_dim]
// A (row, KV head) reads a list of tokens in tiles of 32: each key once per 8 query heads, a value only where p > 0.
// Short lists (at most kShort tokens) are decoded in one launch: short_decode.cu. Long lists:
//   1. score: the blocks of a fixed grid divide all lists; a warp scores a tile for up to 8 heads. It writes the scores
//      of candidates, and for each token a bit that says whether it is a candidate (candidates.cuh).
//   2. solve: a block or a cluster per (row, query head) finds the near tokens among the candidates and then the
//      threshold, and adds up the values of the tokens with p > 0. If at most kFewTokens tokens are near, one block
//      handles them.
// Which tokens are candidates depends on timing. But every near token is a candidate, and the sums depend neither on
// other candidates, nor on other rows, nor on the number of blocks per head. So a row always gets the same bits.
#include "common/work_split.cuh"
#include "kernels.h"
#include "sparse_decode/candidates.cuh"
#include "sparse_decode/head_output.cuh"
#include "sparse_decode/short_decode.cuh"
#include "sparse_decode/softmax_decode.cuh"

namespace entmaxkv::cuda {

namespace {

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * ScanRing<T, Layout>::kWarps, kScanOccupancy<Layout>)
    score(SparseDecode op, Scratch scratch) {
  wait_for_previous_kernel();
  using Slots = ScanRing<T, Layout>;
  __shared__ Queries<T, Layout> s_q;
  __shared__ CandidateScan::Shared s_scan;
  __shared__ int s_held[Slots::kWarps][TileQueue::kHeld];
  constexpr int kBlock = 32 * Slots::kWarps;
  const int groups = HeadGroup::per_row(op), lists = op.batch * groups;
  const auto tiles_of = [&](int index) {
    return TokenList(op, index / groups, HeadGroup(op, index % groups).kv_head).tiles();
  };
  const auto taken_of = [&](int index) {
    return static_cast<int>(__ldcg(scratch.taken + int64_t{index} * Scratch::kCounterStride));
  };
  const auto work = WorkSplit::of_block<kBlock>(lists, tiles_of);
  for (int index = work.items > 0 ? work.list : -1; index >= 0;
       index = list_with_work_left<kBlock>(lists, tiles_of, taken_of)) {
    const int64_t row = index / groups;
    const HeadGroup group(op, index % groups);
    const TokenList list(op, row, group.kv_head);
    TileQueue queue(scratch.taken + int64_t{index} * Scratch::kCounterStride, list.tiles(), s_held[threadIdx.x / 32]);
    const auto more = [&](int n) { return queue.more(n); };
    const auto tile = [&](int n) { return queue.tile(n); };
    const QueryLoad<T, Layout, kBlock> queries(op.q, row, group, op.head_dim);
    const LaneScoring scoring(op, group);
    CandidateScan scan(op, scratch, row, group, exchange_bests(op, list), s_scan);
    Products scores;
    auto stream = list.keys<Slots>(op.k_pages, group.kv_head, op.head_dim, more, tile);
    stream.run(
        [&] {
          __syncthreads();  // all warps are done with the queries of the last list
          queries.store([&](int h, int d, float q) { s_q.set(h, d, q); });
          scan.begin();
          __syncthreads();
        },
        [&](int, const Slot<T, Layout>& slot) {
          scores = {};
          multiply(slot, s_q, group.heads, scores);
        },
        [&](int n) {
          scoring.score(list, tile(n), scores);
          const int tokens = list.tokens - tile(n) * kTileRows;
          scan.learn(tokens, scores);
          scan.exchange(n, !queue.more(n + 1));
          scan.write_candidates(tile(n), tokens, scores);
        });
    scan.end();
  }
}

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, kTeamBlocks) solve(SparseDecode op, Scratch scratch, bool vectors) {
  wait_for_previous_kernel();
  __shared__ NearMemory s_near;
  __shared__ Chunk<T> s_chunk;
  const int64_t row = blockIdx.z;
  const int head = blockIdx.y, kv_head = head / op.group;
  const int64_t at = row * op.q_heads + head;
  const TokenList list(op, row, kv_head);
  constexpr int kLong = 64 << 10;  // from this many tokens on, even reading the candidate bits takes one block long
  const bool together = scratch.candidate_counts[at] > kFewTokens || list.tokens > kLong;
  Team team = Team::blocks(together ? min(parts_of(list.tokens), cluster::size()) : 1);
  if (team.rank >= team.size) return;
  const Entmax<double> entmax(op.alpha.of(head));
  float best = kNothing;
  if (exchange_bests(op, list)) {
    const uint32_t own = threadIdx.x < Scratch::kBests ? scratch.bests[at * Scratch::kBests + threadIdx.x] : 0;
    best = largest<kTeamThreads>(own ? from_ordered(own) : kNothing);
  }
  const NearTokens near =
      near_of_candidates(team, entmax, best, scratch.candidates + at * scratch.tiles(), list.tiles(),
                         scratch.scores + at * scratch.capacity, scratch.places + at * scratch.capacity, s_near);
  if (near.are_few() && team.rank > 0) return;
  HeadOutput<T>{op, list, row, head, kv_head, vectors}.write(team, entmax, near, s_near, s_chunk);
}

/// Returns whether alpha = 1 in every head. Then all tokens have weight.
bool is_softmax(const SparseDecode& op) { return !op.alpha.per_head && Entmax<double>(op.alpha.value).is_softmax(); }

}  // namespace

int64_t workspace_bytes(const SparseDecode& op) {
  if (is_softmax(op)) return softmax_workspace_bytes(op);
  return is_short(op) ? 0 : Scratch{capacity_of(op)}.place(op, nullptr);
}

void sparse_decode(const SparseDecode& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  if (is_softmax(op)) return softmax_decode(op, workspace, stream);
  const char* name = op.selection ? "sparse_decode" : "dense_decode";
  const bool value_vectors = in_vectors(op.v_pages, op.dtype, op.head_dim);
  if (is_short(op)) return short_decode(name, op, value_vectors, stream);
  Scratch scratch{capacity_of(op)};
  scratch.place(op, workspace);
  const int words = Scratch::kCounterStride + Scratch::kBests + 1;
  check(name, cudaMemsetAsync(scratch.taken, 0, int64_t{op.batch} * op.q_heads * words * 4, stream));
  dispatch_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_layout(op.head_dim, in_vectors(op.k_pages, op.dtype, op.head_dim), [&](auto layout) {
      using Layout = decltype(layout);
      using Slots = ScanRing<T, Layout>;
      launch(name, score<T, Layout>,
             {dim3(kScanBlocks<Layout> * multiprocessors()), 32 * Slots::kWarps, 1, Slots::kBytes}, stream, op,
             scratch);
    });
    const int64_t most = 2 * kTeamBlocks * multiprocessors();  // twice as many as run at once: some end right away
    int blocks = std::min(parts_of(scratch.capacity), cluster::most_blocks());
    while (blocks > 1 && int64_t{blocks} * op.q_heads * op.batch > most) blocks /= 2;
    launch(name, solve<T>, {dim3(blocks, op.q_heads, op.batch), kTeamThreads, blocks, CandidateList::kBytes}, stream,
           op, scratch, value_vectors);
  });
}

}  // namespace entmaxkv::cuda
