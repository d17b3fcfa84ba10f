// sparse_decode and dense_decode on the GPU where lists are short (at most kShort tokens).
//   s_i = scale q . k_i + bias,  p_i = [(alpha-1) s_i - tau]_+^beta with sum p_i = 1,  out = sum_i p_i v_i
// Grid (blocks of a cluster, group of up to 8 query heads, row); a cluster decodes a list. Each key is read once per
// group, a value only where p > 0.
//   1. score: the cluster's warps multiply the tiles of the list in turn, and send the scores of a head to the block of
//      that head.
//   2. solve: a block finds the near tokens of its heads, their thresholds, and adds up the values of the tokens with
//      p > 0.
#include "common/launch.cuh"
#include "sparse_decode/short_decode.cuh"
#include "sparse_decode/support.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kBlocks = 2;  // blocks that share a multiprocessor

static_assert(kShort % kTeamThreads == 0);

template <typename T, typename Layout>
using ShortRing = Ring<T, Layout, kTeamThreads / 32>;

/// Returns how many blocks the cluster of a short list has: fewer than the most, if all clusters would not fit the GPU
/// at once.
int blocks_of_short(const SparseDecode& op) {
  int blocks = cluster::most_blocks();
  while (blocks > 2 && int64_t{blocks} * HeadGroup::per_row(op) * op.batch > multiprocessors()) blocks /= 2;
  return blocks;
}

/// Returns how many bytes a block needs for the scores of its heads.
int score_bytes(const SparseDecode& op, int blocks) {
  return ceil_div(std::min(op.group, kTileHeads), blocks) * capacity_of(op) * static_cast<int>(sizeof(float));
}

/// Finds the near tokens of a list of at most kShort tokens, as find_near does. scores [tokens] holds all scores, in
/// shared memory; those of near tokens, and their places, come to the front of scores and places. All threads of the
/// block call and all get the result.
__device__ NearTokens near_of_short(const Entmax<float>& entmax, int tokens, float* scores, int32_t* places) {
  static_assert(kTileRows == 32 && kShort <= kFewTokens);
  constexpr int kOwn = kShort / kTeamThreads;
  const int thread = threadIdx.x;
  __shared__ float s_maxima[kShort / kTileRows];
  float own[kOwn], best = kNothing;  // each warp has the tokens of a tile at a time
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int token = i * kTeamThreads + thread;
    own[i] = token < tokens ? scores[token] : kNothing;
    const float of_tile = from_ordered(__reduce_max_sync(kAllLanes, ordered(own[i])));
    if (thread % 32 == 0) s_maxima[token / kTileRows] = of_tile;
    best = larger(best, of_tile);
  }
  best = largest<kTeamThreads>(best);  // its barriers also order s_maxima
  Team block = Team::block();
  const float floor = find_floor(entmax, best, FewScores<Team>{block, s_maxima, ceil_div(tokens, kTileRows)});
  bool near[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) near[i] = own[i] > floor;
  const Places<kTeamThreads, kOwn> to(near);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!near[i]) continue;
    scores[to.place[i]] = own[i];
    places[to.place[i]] = i * kTeamThreads + thread;
  }
  __syncthreads();
  NearTokens result{{scores, to.count}, places};
  result.set_origin(entmax, best, floor);
  return result;
}

template <typename T, typename Layout>
__global__ void __launch_bounds__(kTeamThreads, kBlocks) decode_short(SparseDecode op, int capacity, bool vectors) {
  wait_for_previous_kernel();
  using Slots = ShortRing<T, Layout>;
  __shared__ Queries<T, Layout> s_q;
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
        cluster::wait();  // all blocks run and have opened their mailboxes
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
    // The ring is free now.
    auto* s_places = reinterpret_cast<int32_t*>(dynamic_shared());
    auto& s_values = *reinterpret_cast<OwnValues<T>*>(s_places + kShort);
    static_assert(kShort * sizeof(*s_places) + sizeof(s_values) <= Slots::kBytes);
    const NearTokens near =
        near_of_short(Entmax<float>(entmax), list.tokens, s_scores + h / blocks * capacity, s_places);
    const Head<T> decoded{op, list, row, head, group.kv_head};
    decoded.decode_few(entmax, near, kShort, s_values, vectors);
    __syncthreads();  // before the next head
  }
}

}  // namespace

/// Returns whether decode_short takes the lists. It needs clusters, as otherwise one block would work for a list, and
/// shared memory for the scores of a block's heads, which some GPUs do not have.
bool is_short(const SparseDecode& op) {
  constexpr int kOthers = 19 << 10;  // most bytes of shared memory beside the ring and the scores
  if (!is_hopper_or_later() || capacity_of(op) > kShort) return false;
  const int bytes = kRingBytes + score_bytes(op, blocks_of_short(op)) + kOthers;
  return bytes <= device_property(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

void short_decode(const char* name, const SparseDecode& op, bool value_vectors, cudaStream_t stream) {
  const int blocks = blocks_of_short(op), bytes = score_bytes(op, blocks);
  dispatch_element(op.dtype, [&](auto element) {
    dispatch_layout(op.head_dim, in_vectors(op.k_pages, op.dtype, op.head_dim), [&](auto layout) {
      using T = decltype(element);
      using Layout = decltype(layout);
      launch(
          name, decode_short<T, Layout>,
          {dim3(blocks, HeadGroup::per_row(op), op.batch), kTeamThreads, blocks, ShortRing<T, Layout>::kBytes + bytes},
          stream, op, capacity_of(op), value_vectors);
    });
  });
}

}  // namespace entmaxkv::cuda
