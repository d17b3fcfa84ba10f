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
// Lists of at most kShort tokens need no bits and no third step: solve takes all their scores and chunks.
// What is alive depends on timing, but a token that has weight always is, and no sum depends on the others, on the
// grid or on other rows. So the bits of a row are always the same.
#include "kernels.h"
#include "tile.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kScoreWarps = 4;
constexpr int kChunk = 512;  // tokens whose values are added up together
constexpr int kShort = 8 * kChunk;
static_assert(kThreads >= kMaxHeadDim);

/// Blocks of step 1 that a multiprocessor has registers for.
template <typename Layout>
constexpr int kScoreBlocks = Layout::kRounds == 8 ? 2 : 3;

/// Results between the launches, per (row, query head).
struct Scratch {
  int capacity;     // tokens of the longest list, in whole tiles
  float* scores;    // [batch, q_heads, capacity] where alive; from step 2 on the weights, packed
  int32_t* places;  // [batch, q_heads, capacity] in the list, of the tokens with weight
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

/// The tokens that one KV head of one row attends to.
struct TokenList {
  const int32_t* selected;  // null: all pages
  const int32_t* table;
  int page_size, page_bits;
  int seq_len;
  int tokens;

  __device__ TokenList(const SparseDecode& op, int64_t row, int kv_head)
      : selected(nullptr), table(op.page_table.row(row)), page_size(op.page_size), seq_len(length_of(op, row)) {
    page_bits = __ffs(page_size) - 1;
    int pages = ceil_div(seq_len, page_size);
    if (op.selection) {
      const int64_t list = row * op.kv_heads + kv_head;
      selected = op.selection.row(list);
      pages = max(0, min(op.selection.counts[list], op.selection.max_selected));
    }
    tokens = 0;
    if (pages > 0) tokens = (pages - 1) * page_size + min(page_size, seq_len - logical(pages - 1) * page_size);
  }

  __device__ int tiles() const { return ceil_div(tokens, kTileRows); }
  __device__ int logical(int nth) const { return selected ? selected[nth] : nth; }

  /// The value of the token at a place of the list.
  template <typename T>
  __device__ const T* value(const Rows& v_pages, int kv_head, int place) const {
    return v_pages.at<T>(table[logical(place >> page_bits)], kv_head, place & (page_size - 1));
  }
};

/// This block's share of the items of several lists, a run of successive ones.
struct Share {
  int list, item;  // the first
  int items;

  /// Up to `size` items of one list, of which each has `blocks` blocks.
  template <typename Count>
  __device__ static Share fixed(int blocks, int size, Count count) {
    const int list = blockIdx.x / blocks, item = blockIdx.x % blocks * size;
    return {list, item, min(size, count(list) - item)};
  }

  /// As many as any other block, all lists together. All threads call.
  template <int kBlock, typename Count>
  __device__ static Share even(int lists, Count count) {
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

/// A token of a tile, one for each lane; beyond the end of the list its last one.
struct Token {
  int place;
  int position;      // in the sequence
  int slot;          // in the page
  int64_t physical;  // page
  bool there;

  __device__ Token(const TokenList& list, int tile) {
    const int lane = threadIdx.x % 32;
    there = tile * kTileRows + lane < list.tokens;
    place = there ? tile * kTileRows + lane : list.tokens - 1;
    const int logical = list.logical(place >> list.page_bits);
    slot = place & (list.page_size - 1);
    position = logical * list.page_size + slot;
    physical = list.table[logical];
  }

  template <typename T>
  __device__ const T* key(const Rows& k_pages, int kv_head) const {
    return k_pages.at<T>(physical, kv_head, slot);
  }
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
    const bool lives = token.there && !(s < least_of_head);  // NaN lives
    const uint32_t mask = __ballot_sync(kAllLanes, lives);
    if (lane == h) alive = mask;
    if (lives) scratch.scores[(first + h) * scratch.capacity + token.place] = s;
  }
  if (has_head) scratch.alive[(first + lane) * scratch.tiles() + tile] = alive;
}

/// Scores a tile. All lanes call.
template <typename T, typename Layout>
__device__ void score_tile(const SparseDecode& op, const Scratch& scratch, int64_t row, const HeadGroup& group,
                           const TokenList& list, int tile, const Token& token, const Queries<T, Layout>& q,
                           const HeadScoring& scoring, Products& products) {
  const int lane = threadIdx.x % 32;
  const int64_t first = row * op.q_heads + group.first_head;
  multiply<T, Layout, false>(token.key<T>(op.k_pages, group.kv_head), op.head_dim, q, group.heads, products);
  __syncwarp();
  const auto distance = static_cast<float>(token.position - (list.seq_len - 1));
  for (int h = 0; h < group.heads; ++h) {
    const float s = op.scoring.scale * products[h][lane] + scoring.slope[h] * distance;
    if (!scratch.is_short()) {
      products[h][lane] = s;
    } else if (token.there) {
      scratch.scores[(first + h) * scratch.capacity + token.place] = s;
    }
  }
  if (!scratch.is_short()) keep_alive(scratch, first, group.heads, tile, token, scoring, products);
  __syncwarp();  // the products have been read
}

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * kScoreWarps, kScoreBlocks<Layout>) score(SparseDecode op, Scratch scratch) {
  take_turn();
  __shared__ Queries<T, Layout> s_q;
  __shared__ HeadScoring s_scoring;
  __shared__ Products s_products[kScoreWarps];
  const int warp = threadIdx.x / 32;
  const auto tiles_of = [&](int index) {
    const int groups = HeadGroup::per_row(op);
    return TokenList(op, index / groups, HeadGroup(op, index % groups).kv_head).tiles();
  };
  Share share = scratch.is_short() ? Share::fixed(ceil_div(scratch.tiles(), kScoreWarps), kScoreWarps, tiles_of)
                                   : Share::even<32 * kScoreWarps>(op.batch * HeadGroup::per_row(op), tiles_of);
  for (int end; share.items > 0; share = {share.list + 1, 0, share.items - (end - share.item)}) {
    const int64_t row = share.list / HeadGroup::per_row(op);
    const HeadGroup group(op, share.list % HeadGroup::per_row(op));
    const TokenList list(op, row, group.kv_head);
    end = min(list.tiles(), share.item + share.items);
    if (end == 0) continue;
    Token next(list, min(share.item + warp, end - 1));
    __syncthreads();  // every warp is done with the last group's queries
    for_each_query<T, Layout>(op.q, row, group.first_head, group.heads, op.head_dim,
                              [&](int h, int d, float x) { s_q.set(h, d, x); });
    if (threadIdx.x < group.heads) {
      const int head = group.first_head + threadIdx.x;
      s_scoring.slope[threadIdx.x] = op.scoring.slope(head);
      // Rounded up: what lives in vain falls to the exact test in solve.
      s_scoring.reach[threadIdx.x] = static_cast<float>(Entmax<double>(op.alpha.of(head)).beta) * (1 + 0x1p-22f);
    }
    __syncthreads();
    for (int tile = share.item + warp; tile < end; tile += kScoreWarps) {
      const Token token = next;
      if (tile + kScoreWarps < end) next = Token(list, tile + kScoreWarps);  // a tile ahead, off the critical path
      score_tile<T, Layout>(op, scratch, row, group, list, tile, token, s_q, s_scoring, s_products[warp]);
    }
  }
}

/// Lists the places of the tokens that are alive, in their order; returns how many. All threads call.
__device__ int list_alive(const uint32_t* alive, int tiles, int32_t* places) {
  int count = 0;
  for (int first = 0; first < tiles; first += kThreads * kRun) {
    uint32_t masks[kRun];
    int own = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int tile = first + static_cast<int>(threadIdx.x) * kRun + i;
      masks[i] = tile < tiles ? alive[tile] : 0;
      own += __popc(masks[i]);
    }
    int more;
    int to = count + exclusive_scan<kThreads>(own, more);
    count += more;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int tile = first + static_cast<int>(threadIdx.x) * kRun + i;
      for (uint32_t mask = masks[i]; mask; mask &= mask - 1) places[to++] = tile * kTileRows + __ffs(mask) - 1;
    }
  }
  __syncthreads();
  return count;
}

/// sum_i weights[i] v_d of the tokens at places[i], i < count <= kChunk, for dimension d = threadIdx.x. All threads
/// call.
template <typename T>
__device__ float gather(const SparseDecode& op, const TokenList& list, int kv_head, bool vectors, const float* weights,
                        const int32_t* places, int count) {
  constexpr int kDims = 8;  // of a thread
  constexpr int kCount = 16 / sizeof(T);
  __shared__ float s_weights[kChunk];
  __shared__ const T* s_values[kChunk];
  __shared__ float s_sums[kThreads * kDims];
  __syncthreads();  // the tokens of an earlier call have been read
  for (int i = threadIdx.x; i < count; i += kThreads) {
    s_weights[i] = weights[i];
    s_values[i] = list.value<T>(op.v_pages, kv_head, places[i]);
  }
  __syncthreads();
  const int columns = ceil_div(op.head_dim, kDims), tokens_at_once = kThreads / columns;
  const int column = threadIdx.x % columns, offset = threadIdx.x / columns;
  float sum[kDims] = {};
  if (offset < tokens_at_once) {
#pragma unroll 4
    for (int i = offset; i < count; i += tokens_at_once) {
      const T* value = s_values[i];
#pragma unroll
      for (int word = 0; word < kDims / kCount; ++word) {
        float values[kCount];
        const int d = column * kDims + word * kCount;
        unpack<T>(vectors ? load_word<true>(value, d, op.head_dim) : load_word<false>(value, d, op.head_dim), values);
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum[word * kCount + e] += s_weights[i] * values[e];
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kDims; ++e) s_sums[threadIdx.x * kDims + e] = sum[e];
  __syncthreads();
  float total = 0;
  if (threadIdx.x < op.head_dim) {
    for (int i = 0; i < min(tokens_at_once, count); ++i) total += s_sums[i * columns * kDims + threadIdx.x];
  }
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) solve(SparseDecode op, Scratch scratch, bool vectors) {
  take_turn();
  const int64_t row = blockIdx.y;
  const int head = blockIdx.x, kv_head = head / op.group;
  const int64_t at = row * op.q_heads + head;
  const TokenList list(op, row, kv_head);
  float* scores = scratch.scores + at * scratch.capacity;
  int32_t* places = scratch.places + at * scratch.capacity;

  const Entmax<double> entmax(op.alpha.of(head));
  const auto unless_far = [&](float score, float best) {
    return static_cast<double>(score) - best > -entmax.beta ? score : kNothing;
  };
  float best = kNothing;
  int count;
  if (scratch.is_short()) {
    Candidates{scores, list.tokens}.visit<kThreads, kRun>([&](const float (&run)[kRun]) {
      for (const float score : run) best = larger(best, score);
    });
    best = largest<kThreads>(best);
    count = pack(scores, places, list.tokens, [&](int i) { return Entry{unless_far(scores[i], best), i}; });
  } else {
    best = from_ordered(scratch.best[at]);
    count = list_alive(scratch.alive + at * scratch.tiles(), list.tiles(), places);
    count = pack(scores, places, count, [&](int i) { return Entry{unless_far(scores[places[i]], best), places[i]}; });
  }
  float tau = 0;
  const int support = weigh(entmax, best, scores, places, count, tau);
  const bool undefined = support == 0 && list.tokens > 0;  // some score is no number
  if (threadIdx.x == 0) {
    op.tau[at] = undefined ? kUndefined : list.tokens > 0 ? tau : 0;
    op.support[at] = support;
    if (head % op.group == 0) op.tokens[row * op.kv_heads + kv_head] = list.tokens;
  }
  if (support > kChunk && !scratch.is_short()) return;
  float total = undefined ? kUndefined : 0;
  for (int first = 0; first < support; first += kChunk) {
    total += gather<T>(op, list, kv_head, vectors, scores + first, places + first, min(kChunk, support - first));
  }
  if (threadIdx.x < op.head_dim) op.out.at<T>(row, head)[threadIdx.x] = from_float<T>(total);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) spread(SparseDecode op, Scratch scratch, bool vectors) {
  take_turn();
  __shared__ bool s_last;
  const int d = threadIdx.x;
  const auto chunks_of = [&](int at) { return op.support[at] > kChunk ? ceil_div(op.support[at], kChunk) : 0; };
  Share share = Share::even<kThreads>(op.batch * op.q_heads, chunks_of);
  for (int end; share.items > 0; share = {share.list + 1, 0, share.items - (end - share.item)}) {
    const int64_t at = share.list, row = at / op.q_heads;
    const int head = at % op.q_heads, kv_head = head / op.group;
    const TokenList list(op, row, kv_head);
    const int chunks = chunks_of(share.list);
    end = min(chunks, share.item + share.items);
    float* partial = scratch.partial + at * scratch.chunks() * op.head_dim;
    for (int chunk = share.item; chunk < end; ++chunk) {
      const int64_t from = at * scratch.capacity + chunk * kChunk;
      const float own = gather<T>(op, list, kv_head, vectors, scratch.scores + from, scratch.places + from,
                                  min(kChunk, op.support[at] - chunk * kChunk));
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
      const int lists = op.batch * HeadGroup::per_row(op);
      const int blocks = scratch.is_short() ? lists * ceil_div(scratch.tiles(), kScoreWarps)
                                            : kScoreBlocks<decltype(layout)> * processors;
      launch(name, score<T, decltype(layout)>, {dim3(blocks), 32 * kScoreWarps}, stream, op, scratch);
    });
    launch(name, solve<T>, {dim3(op.q_heads, op.batch), kThreads}, stream, op, scratch, value_vectors);
    if (!scratch.is_short()) {
      launch(name, spread<T>, {dim3(2 * processors), kThreads}, stream, op, scratch, value_vectors);
    }
  });
}

}  // namespace entmaxkv::cuda
