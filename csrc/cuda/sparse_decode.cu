// sparse_decode and dense_decode on the GPU.
//   s_i = scale q . k_i + bias,  p_i = [(alpha-1) s_i - tau]_+^beta with sum p_i = 1,  out = sum_i p_i v_i
//   q, out [batch, q_heads, head_dim], k_pages, v_pages [pages, kv_heads, page_size, head_dim]
// A (row, KV head) reads a list of tokens in tiles of 32: each key once per 8 query heads, a value only where p > 0.
// Where all lists are short (is_short), they are decoded in one launch: short_decode.cu. Else:
//   1. scan: all blocks divide all lists; a warp scores a tile for up to 8 heads. It writes the scores, and the best
//      score of each tile.
//   2. solve: a block, or a cluster if they are many, finds a head's near tokens in the tiles with high scores, the
//      threshold, and the tokens with p > 0. It adds up their values if these are few, and else lists them.
//   3. add_values: all blocks divide the listed tokens of all heads and add up their values.
// Weights, and the sums of values, depend on the head's tokens with weight alone: not on other rows, on other tokens of
// the list, or on the number of blocks. So a row always gets the same bits.
#include "common/work_split.cuh"
#include "kernels.h"
#include "sparse_decode/bulk_ring.cuh"
#include "sparse_decode/scratch.cuh"
#include "sparse_decode/short_decode.cuh"
#include "sparse_decode/softmax_decode.cuh"
#include "sparse_decode/support.cuh"

namespace entmaxkv::cuda {

namespace {

/// Writes the scores of a list for the heads of a group, tile by tile.
class ScoreWriter {
 public:
  __device__ ScoreWriter(const SparseDecode& op, const Scratch& scratch, int64_t row, const HeadGroup& group)
      : scratch_(scratch), group_(group), first_(row * op.q_heads + group.first_head) {}

  /// Looks at the heads, before the first write. All lanes call.
  __device__ void prepare(const SparseDecode& op) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int head = group_.first_head + min(Products::head(j), group_.heads - 1);
      reach_[j] = reach_of(scratch_.entmax_of(op.alpha, head));
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

/// How the warps of a block divide the lists of a row. Without a selection, all lists of a row have equally many
/// tokens: then as many lists as possible are read side by side, each by as many warps, because the keys of a page's
/// heads are neighbours in memory.
template <int kWarps>
struct SideBySide {
  int lists, warps_per_list;

  __device__ explicit SideBySide(const SparseDecode& op) : lists(op.selection ? 1 : kWarps) {
    while (HeadGroup::per_row(op) % lists != 0) lists /= 2;
    warps_per_list = kWarps / lists;
  }
};

/// Shared memory of a block of `scan` beside its ring.
template <typename Slots>
using WarpQueries = Queries<typename Slots::T, typename Slots::Layout>[Slots::kWarps];

/// Blocks of `scan` that share a multiprocessor of an H200.
template <typename Slots>
constexpr int kScansAtOnce =
    std::min(kScanBlocks<typename Slots::Layout>,
             static_cast<int>((227 << 10) / (Slots::kBytes + sizeof(WarpQueries<Slots>) + 1024)));

template <typename Slots>
__global__ void __launch_bounds__(32 * Slots::kWarps, kScanOccupancy<typename Slots::Layout>)
    scan(SparseDecode op, Scratch scratch) {
  wait_for_previous_kernel();
  __shared__ WarpQueries<Slots> s_queries;
  const int warp = threadIdx.x / 32;
  auto& s_q = s_queries[warp];
  const SideBySide<Slots::kWarps> together(op);
  const int sets = HeadGroup::per_row(op) / together.lists;  // of a row's lists
  const auto row_of = [=](int set) { return set < sets ? 0 : set / sets; };
  const auto group_of = [&](int set, int list) {
    return HeadGroup(op, (set - row_of(set) * sets) * together.lists + list);
  };
  const auto tiles_of = [&](int set) { return TokenList(op, row_of(set), group_of(set, 0).kv_head).tiles(); };
  const auto work = WorkSplit::of_block<32 * Slots::kWarps>(op.batch * sets, tiles_of);
  work.visit(tiles_of, [&](int set, int first, int count) {
    const int64_t row = row_of(set);
    const HeadGroup group = group_of(set, warp % together.lists);
    const TokenList list(op, row, group.kv_head);
    const int offset = warp / together.lists, step = together.warps_per_list;
    const auto tile = [=](int n) { return first + offset + n * step; };
    LaneScoring scoring;
    ScoreWriter writer(op, scratch, row, group);
    Products scores;
    auto stream = list.keys<Slots>(op.k_pages, group.kv_head, op.head_dim, Upto{ceil_div(count - offset, step)}, tile,
                                   read_once(scratch.is_long));
    stream.run(
        [&] {            // while the first keys are on their way
          __syncwarp();  // all lanes are done with the queries of the last list
          load_queries(op.q, row, group, op.head_dim, scratch.q_vectors, s_q);
          scoring = LaneScoring(op, group);
          writer.prepare(op);
          __syncwarp();
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
/// Where lists have room for more tokens than this, clusters solve. A cluster takes longer to start than a block.
constexpr int kTokensAlone = 64 << 10;

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, kSolveBlocks) solve(SparseDecode op, Scratch scratch, bool vectors) {
  wait_for_previous_kernel();
  Team team = Team::cluster();
  const int64_t row = blockIdx.z;
  const int head = blockIdx.y, kv_head = head / op.group;
  const int64_t at = row * op.q_heads + head;
  const TokenList list(op, row, kv_head);
  const Entmax<double> entmax = scratch.entmax_of(op.alpha, head);
  const Entmax<float> in_float(entmax);
  // If the list has at most kWindow tiles, every block looks at all of them. So all agree on whether the first block
  // can finish alone.
  const bool divided = team.size > 1 && list.tiles() > ListScores::kWindow;
  team.meet();
  Team lookers = divided ? team : Team::block();
  ListScores scores(lookers, in_float, scratch.maxima + at * scratch.tiles(), scratch.scores + at * scratch.capacity,
                    list.tiles(), scratch.batch_tiles);
  if (divided) {
    team = lookers;
  } else if (scores.near_tiles() <= ListScores::kAlone) {
    if (team.rank > 0) return;
    team = lookers;
  } else {
    scores.share(team);
  }
  const HeadArrays arrays{scratch.weights(at), scratch.rows(at)};
  const NearTokens near = find_near(team, in_float, scores);
  const Head<T> solved{op, list, row, head, kv_head};
  int listed = 0;
  if (near.few()) {
    if (team.rank > 0) return;
    team = Team::block();
    static_assert(sizeof(OwnValues<T>) <= sizeof(ListScores::Memory::scores));
    auto& s_values = reinterpret_cast<OwnValues<T>&>(ListScores::memory().scores);  // nobody reads these any longer
    const int support = solved.decode_few(entmax, near, kOwnValues, s_values, vectors);
    if (support > kOwnValues) {
      listed = support;
#pragma unroll 1
      for (int i = threadIdx.x; i < support; i += kTeamThreads) {
        arrays.weights[i] = near.scores[i];
        arrays.rows[i] = static_cast<uint32_t>(near.places[i]);
      }
    }
  } else {
    listed = max(solved.list_many(team, entmax, scores, near, arrays), 0);
  }
  if (team.rank == 0 && threadIdx.x == 0) {
    scratch.supports[at] = listed;
    scratch.arrived[at] = 0;
  }
  team.sync();  // no block ends while another reads its shared memory
}

constexpr int kValueBlocks = 2;  // blocks of add_values that share a multiprocessor
constexpr int kMostSharers = 4;  // heads for which a value is read once, at most

/// The heads for which a block adds up values: one head, or those of up to kMostSharers heads of a group that have
/// weight on every token of the list. Such heads list the same tokens, so each value is read once for all of them. The
/// first of them has the chunks of all.
struct Sharers {
  int first;         // counted over the heads of all rows
  uint32_t members;  // bit i: head first + i is one of them
  int support;

  /// Returns whether a head has weight on every token of its list, and so many that it shares the reading.
  static __device__ bool shares(const SparseDecode& op, const Scratch& scratch, int head) {
    const int support = scratch.supports[head];
    return support > kLeastValues && support == op.tokens[head / op.group];
  }

  /// Returns the number of chunks that a head has, 0 if `solve` has written its output.
  static __device__ int chunks_of(const SparseDecode& op, const Scratch& scratch, int head) {
    if (scratch.supports[head] == 0) return 0;
    if (shares(op, scratch, head)) {
      for (int other = head - index_in_set(op, head); other < head; ++other) {
        if (shares(op, scratch, other)) return 0;
      }
    }
    return value_chunks_of(scratch.supports[head]);
  }

  /// The heads for which the block that has chunks of `head` adds up values.
  __device__ Sharers(const SparseDecode& op, const Scratch& scratch, int head)
      : first(head), members(1), support(scratch.supports[head]) {
    if (!shares(op, scratch, head)) return;
    const int count = min(kMostSharers - index_in_set(op, head), op.group - head % op.group);
    for (int nth = 1; nth < count; ++nth) members |= uint32_t{shares(op, scratch, head + nth)} << nth;
  }

  /// Calls body(nth) for each head first + nth.
  template <typename Body>
  __device__ void visit(Body body) const {
#pragma unroll 1
    for (int nth = 0; nth < kMostSharers; ++nth) {
      if (members >> nth & 1) body(nth);
    }
  }

 private:
  /// Returns the index of a head in the set of those that may share with it.
  static __device__ int index_in_set(const SparseDecode& op, int head) { return head % op.group % kMostSharers; }
};

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, kValueBlocks)
    add_values(SparseDecode op, Scratch scratch, bool vectors) {
  wait_for_previous_kernel();
  using Chunk = ValueChunk<T, kMostSharers>;
  __shared__ Chunk s_chunk;
  __shared__ bool s_last;
  const int thread = threadIdx.x;
  const auto chunks_of = [&](int head) { return Sharers::chunks_of(op, scratch, head); };
  const auto work = WorkSplit::of_block<kTeamThreads>(op.batch * op.q_heads, chunks_of);
  work.visit(chunks_of, [&](int first_head, int first_chunk, int chunks_here) {
    const Sharers sharers(op, scratch, first_head);
    const int support = sharers.support, size = value_chunk_size(support), chunks = value_chunks_of(support);
    const auto write = [&](int nth, float sum) {
      if (thread >= op.head_dim) return;
      const int row = first_head / op.q_heads, head = first_head % op.q_heads + nth;
      op.out.at<T>(row, head)[thread] = from_float<T>(sum);
    };
    const auto sums_of = [&](int nth, int chunk) {
      return scratch.sums + (int64_t{first_head + nth} * scratch.chunks + chunk) * scratch.dims;
    };
    const auto add_chunk = [&](int chunk, auto heads) {
      constexpr int kHeads = decltype(heads)::value;
      const int begin = chunk * size, end = chunk == chunks - 1 ? support : begin + size;
      typename Chunk::template Own<kHeads> own;
      // While the values of some tokens are added up, the rows and weights of the next ones are on their way.
      uint32_t next_row = 0;
      float next_weights[kHeads] = {};
      const auto load_next = [&](int from) {
        if (from + thread >= end) return;
        next_row = scratch.rows(first_head)[from + thread];
#pragma unroll
        for (int nth = 0; nth < kHeads; ++nth) {
          if (sharers.members >> nth & 1) next_weights[nth] = scratch.weights(first_head + nth)[from + thread];
        }
      };
      load_next(begin);
#pragma unroll 1
      for (int from = begin; from < end; from += kLeastValues) {
        __syncthreads();  // the tokens before these have been read
        s_chunk.values[thread] = value_of<T>(op, first_head % op.q_heads / op.group, next_row);
#pragma unroll
        for (int nth = 0; nth < kHeads; ++nth) s_chunk.weights[nth][thread] = next_weights[nth];
        __syncthreads();
        load_next(from + kLeastValues);
        s_chunk.add_to(own, op.head_dim, vectors, min(kLeastValues, end - from));
      }
#pragma unroll
      for (int nth = 0; nth < kHeads; ++nth) {
        const float total = s_chunk.total(own, nth, op.head_dim, end - begin);
        if (!(sharers.members >> nth & 1)) continue;
        if (chunks == 1) {
          write(nth, total);
        } else if (thread < scratch.dims) {
          sums_of(nth, chunk)[thread] = total;
        }
      }
    };
#pragma unroll 1
    for (int chunk = first_chunk; chunk < first_chunk + chunks_here; ++chunk) {
      if (sharers.members == 1) {
        add_chunk(chunk, std::integral_constant<int, 1>{});
      } else {
        add_chunk(chunk, std::integral_constant<int, kMostSharers>{});
      }
    }
    if (chunks == 1) return;
    // The block that arrives last adds up the chunks.
    __threadfence();
    __syncthreads();
    if (thread == 0) {
      s_last = atomicAdd(scratch.arrived + first_head, static_cast<uint32_t>(chunks_here)) + chunks_here ==
               static_cast<uint32_t>(chunks);
    }
    __syncthreads();
    if (!s_last) return;
    __threadfence();
    sharers.visit([&](int nth) { write(nth, total_of_chunks(sums_of(nth, 0), chunks, scratch.dims, s_chunk.sums)); });
  });
}

/// Returns whether alpha = 1 in every head. Then every value is read.
bool is_softmax(const SparseDecode& op) { return !op.alpha.per_head && Entmax<double>(op.alpha.value).is_softmax(); }

}  // namespace

int64_t workspace_bytes(const SparseDecode& op) {
  if (is_softmax(op)) return softmax_workspace_bytes(op);
  return is_short(op) ? 0 : Scratch(op).place(op, nullptr);
}

void sparse_decode(const SparseDecode& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  if (is_softmax(op)) return softmax_decode(op, workspace, stream);
  const char* name = op.selection ? "sparse_decode" : "dense_decode";
  const bool value_vectors = in_vectors(op.v_pages, op.dtype, op.head_dim);
  if (is_short(op)) return short_decode(name, op, value_vectors, stream);
  Scratch scratch(op);
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
        const auto blocks = std::clamp<int64_t>((tiles + Slots::kWarps - 1) / Slots::kWarps, 1,
                                                kScansAtOnce<Slots> * multiprocessors());
        launch(name, scan<Slots>, {dim3(static_cast<unsigned>(blocks)), 32 * Slots::kWarps, 1, Slots::kBytes}, stream,
               op, scratch);
      };
      if constexpr (Layout::kVectors) {
        const bool by_runs = in_runs<Layout::kDims>(op.k_pages, op.head_dim) && !op.selection.by_token;
        if (by_runs) return scan_with(BulkRing<T, Layout, 4>{});
      }
      scan_with(ScanRing<T, Layout>{});
    });
    Grid solvers{dim3(1, op.q_heads, op.batch), kTeamThreads, 1, ListScores::memory_bytes(scratch.batch_tiles)};
    if (scratch.capacity > kTokensAlone) {
      // The blocks of one wide head are faster if each has a multiprocessor. If all heads are wide and their lists very
      // long, what counts is that all clusters run.
      solvers.packed = scratch.tiles() > ListScores::kWindow;
      solvers.cluster = cluster::largest_at_once(name, solve<T>, solvers, heads);
      solvers.blocks.x = solvers.cluster;
    }
    launch(name, solve<T>, solvers, stream, op, scratch, value_vectors);
    const auto value_blocks = std::clamp<int64_t>(heads * scratch.chunks, 1, kValueBlocks * multiprocessors());
    launch(name, add_values<T>, {dim3(static_cast<unsigned>(value_blocks)), kTeamThreads}, stream, op, scratch,
           value_vectors);
  });
}

}  // namespace entmaxkv::cuda
