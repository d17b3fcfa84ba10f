// sparse_decode and dense_decode on the GPU.
//   s_i = scale q . k_i + bias,  p_i = [(alpha-1) s_i - tau]_+^beta with sum p_i = 1,  out = sum_i p_i v_i
// The selected pages of a (row, KV head) are a list of tokens, cut into tiles of 32. Every key is read once per group
// of up to 16 query heads, and a value only where p > 0.
//   1. score: the tiles of all lists are divided evenly over a fixed grid, whatever the lengths; a warp scores a tile
//      for all heads of the group. A token is alive while its score is within beta, in s, of the best that any block
//      has seen of its head (entmax.h): one bit says so, and only then is the score written.
//   2. solve: a block per (row, query head) takes the scores that are alive, in the order of the list, finds the
//      threshold, and keeps the tokens with p > 0. Up to kChunk of them it multiplies with their values at once.
//   3. spread: more are cut into chunks, which are divided evenly over a fixed grid; the last block to finish a chunk
//      of a head adds its chunks up, in their order.
// Lists with room for at most kShort tokens need no bits and no third step: a warp scores a tile, and solve takes all
// their scores and chunks.
// What is alive depends on timing, but a token that has weight always is, and no sum depends on the others, on the
// grid or on other rows. So the bits of a row are always the same.
#include "kernels.h"
#include "near_tokens.cuh"
#include "token_list.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kScoreWarps = 4;
constexpr int kChunk = kHeldTokens;  // tokens whose values are added up together
static_assert(kThreads >= kMaxHeadDim);

/// Blocks of step 1 that a multiprocessor has registers for.
template <typename Layout>
constexpr int kScoreBlocks = Layout::kRounds == 8 ? 2 : 3;

/// Results between the launches, per (row, query head).
struct Scratch {
  int capacity;     // tokens of the longest list, in whole tiles
  float* scores;    // [batch, q_heads, capacity] where alive; in step 3 the weights, packed
  int32_t* places;  // [batch, q_heads, capacity] in the list, of the tokens with weight in step 3
  // Where lists may be longer than kShort:
  uint32_t* alive;    // [batch, q_heads, capacity / 32]
  float* partial;     // [batch, q_heads, capacity / kChunk, head_dim] sums of chunks
  uint32_t* best;     // [batch, q_heads] best score, ordered; zeros before step 1
  int32_t* finished;  // [batch, q_heads] chunks; zeros before step 1

  __host__ __device__ bool is_short() const { return capacity <= kShort; }
  __host__ __device__ int tiles() const { return capacity / kTileRows; }
  __host__ __device__ int chunks() const { return ceil_div(capacity, kChunk); }

  /// Lays the arrays out from `memory` on, and says how many bytes they take.
  int64_t place(const SparseDecode& op, void* memory) {
    const int64_t pages = op.selection ? op.selection.max_selected : op.max_pages;
    const int64_t heads = int64_t{op.batch} * op.q_heads;
    capacity = static_cast<int>((pages * op.page_size + kTileRows - 1) / kTileRows * kTileRows);
    int64_t bytes = 0;
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(memory) + bytes);
      bytes += heads * count * 4;
    };
    take(scores, capacity);
    take(places, capacity);
    if (!is_short()) {
      take(alive, tiles());
      take(partial, int64_t{chunks()} * op.head_dim);
      take(best, 1);
      take(finished, 1);
    }
    return bytes;
  }
};

/// This block's even share of the items of several lists, a run of successive ones.
struct Share {
  int list, item;  // the first
  int items;

  /// All threads call.
  template <int kBlock, typename Count>
  __device__ static Share of_block(int lists, Count count) {
    __shared__ Share s_share;
    const int each = ceil_div(lists, kBlock);
    const int first = min(static_cast<int>(threadIdx.x) * each, lists), end = min(first + each, lists);
    int own = 0;
    for (int list = first; list < end; ++list) own += count(list);
    int total;
    int before = exclusive_scan<kBlock>(own, total);
    const auto begin = static_cast<int>(int64_t{total} * blockIdx.x / gridDim.x);
    const auto stop = static_cast<int>(int64_t{total} * (blockIdx.x + 1) / gridDim.x);
    if (begin == stop) return {0, 0, 0};
    if (before <= begin && begin < before + own) {
      int list = first;
      for (int items = count(list); before + items <= begin; items = count(list)) {
        before += items;
        ++list;
      }
      s_share = {list, begin - before, stop - begin};
    }
    __syncthreads();
    return s_share;
  }
};

/// What makes scores of the products of the heads of a group.
struct HeadScoring {
  float slope[kTileHeads];
  float reach[kTileHeads];  // how far below the best score a token is alive
};

/// Writes the scores of a tile that are alive, and which they are. `scores` holds this lane's token's at [head][lane].
/// All lanes call.
__device__ void keep_alive(const Scratch& scratch, int64_t first, int heads, int tile, const Token& token,
                           const HeadScoring& scoring, const Products& scores) {
  const int lane = threadIdx.x % 32;
  const bool has_head = lane < heads;  // and that is this lane's number
  uint32_t best = 0;
  for (int h = 0; h < heads; ++h) {
    const uint32_t best_of_head = __reduce_max_sync(kAllLanes, ordered(scores[h][lane]));
    if (lane == h) best = best_of_head;
  }
  float least = kNothing;
  if (has_head) {
    const uint32_t known = __ldcg(scratch.best + first + lane);
    if (best > known) atomicMax(scratch.best + first + lane, best);
    least = __fsub_rd(from_ordered(max(best, known)), scoring.reach[lane]);
  }
  uint32_t alive = 0;
  for (int h = 0; h < heads; ++h) {
    const float s = scores[h][lane], least_of_head = __shfl_sync(kAllLanes, least, h);
    const bool lives = token.belongs_to(tile) && !(s < least_of_head);  // NaN lives
    const uint32_t mask = __ballot_sync(kAllLanes, lives);
    if (lane == h) alive = mask;
    if (lives) scratch.scores[(first + h) * scratch.capacity + token.place] = s;
  }
  if (has_head) scratch.alive[(first + lane) * scratch.tiles() + tile] = alive;
}

/// Makes scores of the products of a tile, and writes them; `first` is the first head of the group, rows counted in.
/// All lanes call.
__device__ void score_tile(const SparseDecode& op, const Scratch& scratch, int64_t first, int heads,
                           const TokenList& list, int tile, const Token& token, const HeadScoring& scoring,
                           Products& products) {
  const int lane = threadIdx.x % 32;
  const auto distance = static_cast<float>(token.position(list) - (list.seq_len - 1));
  for (int h = 0; h < heads; ++h) {
    const float s = fmaf(scoring.slope[h], distance, op.scoring.scale * products[h][lane]);
    if (!scratch.is_short()) {
      products[h][lane] = s;
    } else if (token.belongs_to(tile)) {
      scratch.scores[(first + h) * scratch.capacity + token.place] = s;
    }
  }
  if (!scratch.is_short()) keep_alive(scratch, first, heads, tile, token, scoring, products);
}

/// Prepares the queries of a group. All threads call.
template <typename T, typename Layout>
__device__ void load_group(const SparseDecode& op, const Scratch& scratch, int64_t row, const HeadGroup& group,
                           Queries<T, Layout>& q, HeadScoring& scoring) {
  for_each_query<T, Layout>(op.q, row, group.first_head, group.heads, op.head_dim,
                            [&](int h, int d, float x) { q.set(h, d, x); });
  if (threadIdx.x < group.heads) {
    const int head = group.first_head + threadIdx.x;
    scoring.slope[threadIdx.x] = op.scoring.slope(head);
    if (!scratch.is_short()) {  // rounded up: what lives in vain falls to the exact test in solve
      scoring.reach[threadIdx.x] = static_cast<float>(Entmax<double>(op.alpha.of(head)).beta) * (1 + 0x1p-22f);
    }
  }
  __syncthreads();
}

/// Step 1 for short lists: a warp for every tile. Counts the tokens.
template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * kScoreWarps, kScoreBlocks<Layout>)
    score_short(SparseDecode op, Scratch scratch) {
  take_turn();
  __shared__ Queries<T, Layout> s_q;
  __shared__ HeadScoring s_scoring;
  __shared__ Products s_products[kScoreWarps];
  const int warp = threadIdx.x / 32, tile = blockIdx.x * kScoreWarps + warp;
  const int64_t row = blockIdx.z;
  const HeadGroup group(op, blockIdx.y);
  const TokenList list(op, row, group.kv_head);
  if (blockIdx.x == 0 && threadIdx.x == 0) op.tokens[row * op.kv_heads + group.kv_head] = list.tokens;
  if (scratch.capacity == 0 || op.max_pages == 0) return;
  const Token token(list, tile);
  const T* key = token.key<T>(op.k_pages, group.kv_head, list);
  const bool works = tile < list.tiles();
  RowStream<T, Layout> rows;
  if (works) rows.start(key, op.head_dim);
  load_group(op, scratch, row, group, s_q, s_scoring);
  if (!works) return;
  multiply<T, Layout, false>(rows, key, nullptr, op.head_dim, s_q, group.heads, s_products[warp]);
  __syncwarp();
  score_tile(op, scratch, row * op.q_heads + group.first_head, group.heads, list, tile, token, s_scoring,
             s_products[warp]);
}

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * kScoreWarps, kScoreBlocks<Layout>) score(SparseDecode op, Scratch scratch) {
  take_turn();
  __shared__ Queries<T, Layout> s_q;
  __shared__ HeadScoring s_scoring;
  __shared__ Products s_products[kScoreWarps];
  const int warp = threadIdx.x / 32;
  Products& products = s_products[warp];
  const int groups = HeadGroup::per_row(op);
  Share share = Share::of_block<32 * kScoreWarps>(op.batch * groups, [&](int index) {
    return TokenList(op, index / groups, HeadGroup(op, index % groups).kv_head).tiles();
  });
  for (int end; share.items > 0; share = {share.list + 1, 0, share.items - (end - share.item)}) {
    const int64_t row = share.list / groups;
    const HeadGroup group(op, share.list % groups);
    const TokenList list(op, row, group.kv_head);
    end = min(list.tiles(), share.item + share.items);
    if (end == 0) continue;
    const int first_tile = share.item + warp, last_tile = end - 1;
    Token token(list, min(first_tile, last_tile)), next(list, min(first_tile + kScoreWarps, last_tile));
    RowStream<T, Layout> rows;
    if (first_tile < end) rows.start(token.key<T>(op.k_pages, group.kv_head, list), op.head_dim);
    __syncthreads();  // every warp is done with the last group's queries
    load_group(op, scratch, row, group, s_q, s_scoring);
    for (int tile = first_tile; tile < end; tile += kScoreWarps) {
      const Token later(list, min(tile + 2 * kScoreWarps, last_tile));  // looked up before it is needed
      const T* key = token.key<T>(op.k_pages, group.kv_head, list);
      const T* next_key = tile + kScoreWarps < end ? next.key<T>(op.k_pages, group.kv_head, list) : nullptr;
      multiply<T, Layout, false>(rows, key, next_key, op.head_dim, s_q, group.heads, products);
      __syncwarp();
      score_tile(op, scratch, row * op.q_heads + group.first_head, group.heads, list, tile, token, s_scoring, products);
      __syncwarp();  // the products have been read
      token = next;
      next = later;
    }
  }
}

/// Tokens whose values are added up together.
template <typename T>
struct Chunk {
  float weights[kChunk];
  const T* values[kChunk];

  /// All threads call.
  __device__ void fill(const SparseDecode& op, const TokenList& list, int kv_head, const float* from_weights,
                       const int32_t* places, int count) {
    __syncthreads();  // the tokens of an earlier call have been read
    for (int i = threadIdx.x; i < count; i += kThreads) {
      weights[i] = from_weights[i];
      values[i] = list.value<T>(op.v_pages, kv_head, places[i]);
    }
    __syncthreads();
  }

  /// sum_i weights[i] values[i][d], i < count, for dimension d = threadIdx.x. All threads call, and fill before they
  /// call again.
  __device__ float sum(int head_dim, bool vectors, int count) const {
    constexpr int kDims = 8;  // of a thread
    constexpr int kCount = 16 / sizeof(T);
    __shared__ float s_sums[kThreads * kDims];
    const int columns = ceil_div(head_dim, kDims), tokens_at_once = kThreads / columns;
    const int column = threadIdx.x % columns, offset = threadIdx.x / columns;
    float own[kDims] = {};
    if (offset < tokens_at_once) {
#pragma unroll 4
      for (int i = offset; i < count; i += tokens_at_once) {
#pragma unroll
        for (int word = 0; word < kDims / kCount; ++word) {
          float elements[kCount];
          const int d = column * kDims + word * kCount;
          unpack<T>(vectors ? load_word<true>(values[i], d, head_dim) : load_word<false>(values[i], d, head_dim),
                    elements);
#pragma unroll
          for (int e = 0; e < kCount; ++e) own[word * kCount + e] += weights[i] * elements[e];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kDims; ++e) s_sums[threadIdx.x * kDims + e] = own[e];
    __syncthreads();
    float total = 0;
    if (threadIdx.x < head_dim) {
      for (int i = 0; i < min(tokens_at_once, count); ++i) total += s_sums[i * columns * kDims + threadIdx.x];
    }
    return total;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) solve(SparseDecode op, Scratch scratch, bool vectors) {
  take_turn();
  __shared__ HeldTokens s_held;
  __shared__ Chunk<T> s_chunk;
  const int64_t row = blockIdx.y;
  const int head = blockIdx.x, kv_head = head / op.group;
  const int64_t at = row * op.q_heads + head;
  int32_t& tokens = op.tokens[row * op.kv_heads + kv_head];
  const TokenList list = scratch.is_short() ? TokenList(op, row, kv_head, tokens) : TokenList(op, row, kv_head);
  float* scores = scratch.scores + at * scratch.capacity;
  int32_t* places = scratch.places + at * scratch.capacity;

  const Entmax<double> entmax(op.alpha.of(head));
  const NearTokens near =
      scratch.is_short() ? near_of_short(entmax, list.tokens, scores, places, s_held)
                         : near_of_alive(entmax, from_ordered(scratch.best[at]), scratch.alive + at * scratch.tiles(),
                                         list.tiles(), scores, places, s_held);
  const bool few = near.count <= kChunk, own = few && threadIdx.x < near.count;
  // Where a thread's own value lies is looked up while the threshold is sought.
  const T* value = own ? list.value<T>(op.v_pages, kv_head, near.places[threadIdx.x]) : nullptr;
  const Weights weights = find_weights(entmax, near.best, {near.scores, near.count});
  float total = 0;
  int support;
  if (few) {
    const float weight = own ? weights.of(near.scores[threadIdx.x]) : 0;
    const bool counts[] = {weight > 0};
    const Places<kThreads, 1> to(counts);
    if (counts[0]) {
      s_chunk.weights[to.place[0]] = weight;
      s_chunk.values[to.place[0]] = value;
    }
    __syncthreads();
    support = to.count;
    total = s_chunk.sum(op.head_dim, vectors, support);
  } else {
    support = pack(scores, places, near.count, [&](int i) {
      const float weight = weights.of(scores[i]);
      return Entry{weight > 0 ? weight : kNothing, places[i]};
    });
    const bool here = support <= kChunk || scratch.is_short();
    for (int first = 0; here && first < support; first += kChunk) {
      const int some = min(kChunk, support - first);
      s_chunk.fill(op, list, kv_head, scores + first, places + first, some);
      total += s_chunk.sum(op.head_dim, vectors, some);
    }
  }
  const bool undefined = support == 0 && list.tokens > 0;  // some score is no number
  if (threadIdx.x == 0) {
    op.tau[at] = undefined ? kUndefined : list.tokens > 0 ? weights.tau : 0;
    op.support[at] = support;
    if (!scratch.is_short() && head % op.group == 0) tokens = list.tokens;
  }
  if (support > kChunk && !scratch.is_short()) return;
  if (undefined) total = kUndefined;
  if (threadIdx.x < op.head_dim) op.out.at<T>(row, head)[threadIdx.x] = from_float<T>(total);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) spread(SparseDecode op, Scratch scratch, bool vectors) {
  take_turn();
  __shared__ Chunk<T> s_chunk;
  __shared__ bool s_last;
  const int d = threadIdx.x;
  const auto chunks_of = [&](int at) { return op.support[at] > kChunk ? ceil_div(op.support[at], kChunk) : 0; };
  Share share = Share::of_block<kThreads>(op.batch * op.q_heads, chunks_of);
  for (int end; share.items > 0; share = {share.list + 1, 0, share.items - (end - share.item)}) {
    const int64_t at = share.list, row = at / op.q_heads;
    const int head = at % op.q_heads, kv_head = head / op.group;
    const TokenList list(op, row, kv_head);
    const int chunks = chunks_of(share.list);
    end = min(chunks, share.item + share.items);
    float* partial = scratch.partial + at * scratch.chunks() * op.head_dim;
    for (int chunk = share.item; chunk < end; ++chunk) {
      const int64_t from = at * scratch.capacity + chunk * kChunk;
      const int tokens = min(kChunk, op.support[at] - chunk * kChunk);
      s_chunk.fill(op, list, kv_head, scratch.scores + from, scratch.places + from, tokens);
      const float own = s_chunk.sum(op.head_dim, vectors, tokens);
      if (d < op.head_dim) partial[int64_t{chunk} * op.head_dim + d] = own;
      __threadfence();  // this thread's sums, before the count that announces them
      __syncthreads();
      if (threadIdx.x == 0) s_last = atomicAdd(&scratch.finished[at], 1) == chunks - 1;
      __syncthreads();
      if (!s_last) continue;
      __threadfence();  // the count, before the sums of other blocks
      if (d >= op.head_dim) continue;
      float total = 0;
      for (int each = 0; each < chunks; ++each) total += __ldcg(&partial[int64_t{each} * op.head_dim + d]);
      op.out.at<T>(row, head)[d] = from_float<T>(total);
    }
  }
}

}  // namespace

int64_t workspace_bytes(const SparseDecode& op) { return Scratch{}.place(op, nullptr); }

void sparse_decode(const SparseDecode& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  Scratch scratch;
  scratch.place(op, workspace);
  const char* name = op.selection ? "sparse_decode" : "dense_decode";
  const bool key_vectors = in_vectors(op.k_pages, op.dtype, op.head_dim);
  const bool value_vectors = in_vectors(op.v_pages, op.dtype, op.head_dim);
  const int processors = multiprocessors();
  if (!scratch.is_short()) {
    check(name, cudaMemsetAsync(scratch.best, 0, int64_t{op.batch} * op.q_heads * 8, stream));  // finished, too
  }
  dispatch_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_layout(op.head_dim, key_vectors, [&](auto layout) {
      using Layout = decltype(layout);
      constexpr int kBlock = 32 * kScoreWarps;
      if (scratch.is_short()) {
        const int blocks = std::max(1, ceil_div(scratch.tiles(), kScoreWarps));
        const dim3 grid(blocks, HeadGroup::per_row(op), op.batch);
        launch(name, score_short<T, Layout>, {grid, kBlock}, stream, op, scratch);
      } else {
        launch(name, score<T, Layout>, {dim3(kScoreBlocks<Layout> * processors), kBlock}, stream, op, scratch);
      }
    });
    launch(name, solve<T>, {dim3(op.q_heads, op.batch), kThreads}, stream, op, scratch, value_vectors);
    if (!scratch.is_short()) {
      launch(name, spread<T>, {dim3(2 * processors), kThreads}, stream, op, scratch, value_vectors);
    }
  });
}

}  // namespace entmaxkv::cuda
