// sparse_decode and dense_decode on the GPU.
//   s_i = scale q . k_i + bias,  p_i = [(alpha-1) s_i - tau]_+^beta with sum p_i = 1,  out = sum_i p_i v_i
//   q, out [batch, q_heads, head_dim], k_pages, v_pages [pages, kv_heads, page_size, head_dim]
// A (row, KV head) reads a list of tokens in tiles of 32: each key once per 8 query heads, a value only where p > 0.
// Short lists (at most kShort tokens) are decoded in one launch: short_decode.cu. Long lists:
//   1. scan: the blocks of a fixed grid divide all lists; a warp scores a tile for up to 8 heads. It writes the scores,
//      and the best score of each tile.
//   2. solve: a block, or a cluster if they are many, finds a head's near tokens in the tiles with high scores. It
//   finds
//      the threshold, and lists the tokens with p > 0.
//   3. add_values: all blocks divide the listed tokens of all heads and add up their values.
// Near tokens, and all sums, depend on the head's tokens alone: not on other rows, on other tokens of the list, or on
// the number of blocks. So a row always gets the same bits.
#include "common/bulk_ring.cuh"
#include "common/work_split.cuh"
#include "kernels.h"
#include "sparse_decode/head_output.cuh"
#include "sparse_decode/scratch.cuh"
#include "sparse_decode/short_decode.cuh"
#include "sparse_decode/softmax_decode.cuh"
#include "sparse_decode/values.cuh"

namespace entmaxkv::cuda {

namespace {

/// Writes the scores of a list for the heads of a group, tile by tile.
class ScoreWriter {
 public:
  __device__ ScoreWriter(const SparseDecode& op, const Scratch& scratch, int64_t row, const HeadGroup& group)
      : scratch_(scratch), group_(group), first_(row * op.q_heads + group.first_head) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int head = group.first_head + min(Products::head(j), group.heads - 1);
      reach_[j] = static_cast<float>(scratch.entmax_of(op.alpha, head).beta) * (1 + 0x1p-22f);
    }
  }

  /// Writes a tile's scores, of which the first `tokens` are there, and the best of them. Does not write the scores of
  /// a head if all are so low that no token has weight. All lanes call.
  __device__ void write(int tile, int tokens, Products& scores) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float best = kNothing;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (Products::row(i) >= tokens) scores.of[i][j] = kNothing;
        best = larger(best, scores.of[i][j]);
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) best = larger(best, shuffle_xor(best, distance));
      best_[j] = larger(best_[j], best);
      if (Products::head(j) >= group_.heads) continue;
      const int64_t at = first_ + Products::head(j);
      if (lane < 4) scratch_.maxima[at * scratch_.tiles() + tile] = best;
      if (best < __fsub_rd(best_[j], reach_[j])) continue;
      float* to = scratch_.scores + at * scratch_.capacity + tile * kTileRows + Products::row(0);
      *reinterpret_cast<float4*>(to) = {scores.of[0][j], scores.of[1][j], scores.of[2][j], scores.of[3][j]};
    }
  }

 private:
  const Scratch& scratch_;
  const HeadGroup& group_;
  int64_t first_;                         // row * q_heads + first head of the group
  float reach_[2];                        // a token this far below the best score has no weight
  float best_[2] = {kNothing, kNothing};  // best scores that this warp has seen
};

template <typename Slots>
__global__ void __launch_bounds__(32 * Slots::kWarps, kScanOccupancy<typename Slots::Layout>)
    scan(SparseDecode op, Scratch scratch) {
  wait_for_previous_kernel();
  using T = typename Slots::T;
  using Layout = typename Slots::Layout;
  __shared__ Queries<T, Layout> s_q;
  constexpr int kBlock = 32 * Slots::kWarps;
  const int groups = HeadGroup::per_row(op), warp = threadIdx.x / 32;
  const auto tiles_of = [&](int index) {
    return TokenList(op, index / groups, HeadGroup(op, index % groups).kv_head).tiles();
  };
  const auto work = WorkSplit::of_block<kBlock>(op.batch * groups, tiles_of);
  work.visit(tiles_of, [&](int index, int first, int count) {
    const int64_t row = index / groups;
    const HeadGroup group(op, index % groups);
    const TokenList list(op, row, group.kv_head);
    const auto tile = [=](int n) { return first + warp + n * Slots::kWarps; };
    const QueryLoad<T, Layout, kBlock> queries(op.q, row, group, op.head_dim);
    const LaneScoring scoring(op, group);
    ScoreWriter writer(op, scratch, row, group);
    Products scores;
    auto stream =
        list.keys<Slots>(op.k_pages, group.kv_head, op.head_dim, Upto{ceil_div(count - warp, Slots::kWarps)}, tile);
    stream.run(
        [&] {
          __syncthreads();  // all warps are done with the queries of the last list
          queries.store([&](int h, int d, float q) { s_q.set(h, d, q); });
          __syncthreads();
        },
        [&](int, const auto& slot) {
          scores = {};
          multiply(slot, s_q, group.heads, scores);
        },
        [&](int n) {
          scoring.score(list, tile(n), scores);
          writer.write(tile(n), list.tokens - tile(n) * kTileRows, scores);
        });
  });
}

constexpr int kSolveBlocks = 2;  // blocks of solve that share a multiprocessor

__global__ void __launch_bounds__(kTeamThreads, kSolveBlocks) solve(SparseDecode op, Scratch scratch) {
  wait_for_previous_kernel();
  auto& s_list = *reinterpret_cast<ListScores::Memory*>(dynamic_shared());
  const int64_t row = blockIdx.z;
  const int head = blockIdx.y, kv_head = head / op.group;
  const int64_t at = row * op.q_heads + head;
  const TokenList list(op, row, kv_head);
  const Entmax<double> entmax = scratch.entmax_of(op.alpha, head);
  const Entmax<float> in_float(entmax);
  // Where one window is all, each block of the team looks at all tiles. Then they know whether the near tiles are so
  // few that the first block takes them alone.
  Team team = Team::blocks(cluster::size()), block = Team::block();
  const bool divided = team.size > 1 && list.tiles() > ListScores::kWindow;
  ListScores scores(divided ? team : block, in_float, scratch.maxima + at * scratch.tiles(),
                    scratch.scores + at * scratch.capacity, list.tiles(), s_list);
  if (!divided && scores.near_tiles() <= ListScores::kAlone) {
    if (team.rank > 0) return;
    team = block;
  }
  if (!divided && team.size > 1) scores.share(team);
  const NearTokens near =
      near_of_list(team, in_float, scores,
                   {scratch.near_scores + at * scratch.capacity, scratch.near_places + at * scratch.capacity});
  if (near.few) {
    if (team.rank > 0) return;
    team = block;
  }
  float* weights = scratch.weights(at);
  uint32_t* rows = scratch.rows(at);
  const int support =
      Head{op, list, row, head, kv_head}.find_support(team, entmax, near, [&](int to, float weight, uint32_t pool_row) {
        weights[to] = weight;
        rows[to] = pool_row;
      });
  if (team.rank == 0 && threadIdx.x == 0) {
    scratch.supports[at] = support;
    scratch.arrived[at] = 0;
  }
  team.sync();  // no block ends while another reads its shared memory
}

constexpr int kValueBlocks = 3;  // blocks of add_values that share a multiprocessor

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, kValueBlocks)
    add_values(SparseDecode op, Scratch scratch, bool vectors) {
  wait_for_previous_kernel();
  __shared__ ValueChunk<T> s_chunk;
  __shared__ bool s_last;
  const int thread = threadIdx.x;
  const auto chunks_of = [&](int at) { return value_chunks_of(scratch.supports[at]); };
  const auto work = WorkSplit::of_block<kTeamThreads>(op.batch * op.q_heads, chunks_of);
  work.visit(chunks_of, [&](int at, int first_chunk, int chunks_here) {
    const int64_t row = at / op.q_heads;
    const int head = at % op.q_heads, kv_head = head / op.group;
    const int support = scratch.supports[at], size = value_chunk_size(support), chunks = value_chunks_of(support);
    const float* weights = scratch.weights(at);
    const uint32_t* rows = scratch.rows(at);
    const auto write = [&](float sum) {
      if (thread >= op.head_dim) return;
      op.out.at<T>(row, head)[thread] = from_float<T>(support == kUndefinedHead ? kUndefined : sum);
    };
    float* sums = scratch.sums + int64_t{at} * scratch.chunks * op.head_dim + thread;
    for (int chunk = first_chunk; chunk < first_chunk + chunks_here; ++chunk) {
      const int end = min((chunk + 1) * size, support);
      float total = 0;
      for (int first = chunk * size; first < end; first += ValueChunk<T>::kTokens) {
        const int count = min(ValueChunk<T>::kTokens, end - first);
        __syncthreads();  // the tokens before these have been read
        s_chunk.fill(op, kv_head, weights + first, rows + first, count);
        __syncthreads();
        total += s_chunk.sum(op.head_dim, vectors, count);
      }
      if (chunks == 1) {
        write(total);
      } else if (thread < op.head_dim) {
        sums[int64_t{chunk} * op.head_dim] = total;
      }
    }
    if (chunks == 1) return;
    // The block that arrives last adds up the chunks.
    __threadfence();
    __syncthreads();
    if (thread == 0) {
      s_last = atomicAdd(scratch.arrived + at, static_cast<uint32_t>(chunks_here)) + chunks_here ==
               static_cast<uint32_t>(chunks);
    }
    __syncthreads();
    if (!s_last) return;
    __threadfence();
    if (thread >= op.head_dim) return;
    float total = 0;
#pragma unroll 16
    for (int chunk = 0; chunk < chunks; ++chunk) total += __ldcg(sums + int64_t{chunk} * op.head_dim);
    write(total);
  });
}

/// Returns whether alpha = 1 in every head. Then all tokens have weight.
bool is_softmax(const SparseDecode& op) { return !op.alpha.per_head && Entmax<double>(op.alpha.value).is_softmax(); }

Scratch scratch_of(const SparseDecode& op) {
  Scratch scratch{Entmax<double>(op.alpha.value)};
  scratch.capacity = capacity_of(op);
  scratch.chunks = std::min(ceil_div(scratch.capacity, kLeastValues), kMostValueChunks);
  return scratch;
}

}  // namespace

int64_t workspace_bytes(const SparseDecode& op) {
  if (is_softmax(op)) return softmax_workspace_bytes(op);
  return is_short(op) ? 0 : scratch_of(op).place(op, nullptr);
}

void sparse_decode(const SparseDecode& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  if (is_softmax(op)) return softmax_decode(op, workspace, stream);
  const char* name = op.selection ? "sparse_decode" : "dense_decode";
  const bool value_vectors = in_vectors(op.v_pages, op.dtype, op.head_dim);
  if (is_short(op)) return short_decode(name, op, value_vectors, stream);
  Scratch scratch = scratch_of(op);
  scratch.place(op, workspace);
  const int64_t heads = int64_t{op.batch} * op.q_heads;
  dispatch_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    const bool key_vectors = in_vectors(op.k_pages, op.dtype, op.head_dim);
    dispatch_layout(op.head_dim, key_vectors, [&](auto layout) {
      using Layout = decltype(layout);
      const auto scan_with = [&](auto slots) {
        using Slots = decltype(slots);
        const int64_t tiles = int64_t{op.batch} * HeadGroup::per_row(op) * scratch.tiles();
        const auto blocks =
            std::min<int64_t>((tiles + Slots::kWarps - 1) / Slots::kWarps, kScanBlocks<Layout> * multiprocessors());
        launch(name, scan<Slots>, {dim3(static_cast<unsigned>(blocks)), 32 * Slots::kWarps, 1, Slots::kBytes}, stream,
               op, scratch);
      };
      const bool in_runs = is_hopper_or_later() && key_vectors && op.head_dim == Layout::kDims &&
                           op.k_pages.stride[2] == op.head_dim && !op.selection.by_token;
      if (in_runs) return scan_with(BulkRing<T, Layout, 4>{});
      scan_with(ScanRing<T, Layout>{});
    });
    int blocks = cluster::most_blocks();
    while (blocks > 1 && blocks * heads > kSolveBlocks * multiprocessors()) blocks /= 2;
    launch(name, solve, {dim3(blocks, op.q_heads, op.batch), kTeamThreads, blocks, sizeof(ListScores::Memory)}, stream,
           op, scratch);
    const auto value_blocks = std::min<int64_t>(heads * scratch.chunks, kValueBlocks * multiprocessors());
    launch(name, add_values<T>, {dim3(static_cast<unsigned>(value_blocks)), kTeamThreads}, stream, op, scratch,
           value_vectors);
  });
}

}  // namespace entmaxkv::cuda
