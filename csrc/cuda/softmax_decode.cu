// sparse_decode and dense_decode on the GPU where alpha = 1.
//   s_i = scale q . k_i + bias,  p_i = exp(s_i - best) / mass,  best = max s,  mass = sum_i exp(s_i - best),
//   out = sum_i p_i v_i
// Every key and every value is read once per group of up to 8 query heads. A list is cut into chunks by its length
// alone, so that neither other rows nor the room in its table change a bit.
//   1. attend: the chunks of all lists are divided evenly over a fixed grid. A warp goes through tiles of 32 tokens,
//      keys and then values, and keeps the best score of a chunk so far, and mass and sums relative to it; the block
//      adds up its warps. Meanwhile the next tiles are on their way, be they of this chunk or the next.
//   2. merge: a block per (row, query head, 32 dimensions) adds up the chunks, in their order.
#include "share.cuh"
#include "softmax_decode.cuh"
#include "token_list.cuh"
#include "value_sums.cuh"

namespace entmaxkv::cuda {

namespace {

// Chunks.

/// Small enough that blocks end together, large enough that results of chunks are little to write and read.
constexpr int kLeastChunk = 128, kMostChunk = 1024, kWantedChunks = 256;

/// Tokens of a chunk of a list.
__host__ __device__ constexpr int chunk_size(int tokens) {
  int size = kLeastChunk;
  while (size < kMostChunk && size * kWantedChunks < tokens) size *= 2;
  return size;
}

__host__ __device__ constexpr int chunks_of(int tokens) { return ceil_div(tokens, chunk_size(tokens)); }

/// Of any list with at most that many tokens.
constexpr int most_chunks(int tokens) {
  return std::max(std::min(ceil_div(tokens, kLeastChunk), kWantedChunks), ceil_div(tokens, kMostChunk));
}

/// Lists, one per row and group of heads, are divided in units of kLeastChunk.
__device__ inline int units_of(const TokenList& list) { return ceil_div(list.tokens, kLeastChunk); }

/// One of a block's chunks: of all those that begin in its share. In shared memory.
struct Chunk {
  int64_t row;
  HeadGroup group;
  TokenList list;
  int index;        // of the list
  int nth;          // chunk of the list
  int first, last;  // its tiles
  int size;         // units
  int end;          // of the share in this list, in units
  int left;         // of the share in later lists

  __device__ Chunk() {}

  __device__ bool is_there() const { return first < last; }

  /// Becomes the first one, or the one behind another; then call settle.
  __device__ void begin(const SparseDecode& op, const Share& share) {
    index = share.list;
    left = share.items;
    enter(op, share.item);
  }
  __device__ void follow(const Chunk& before) {
    *this = before;
    ++nth;
  }

  /// Goes on to where a chunk is, if there is one.
  __device__ void settle(const SparseDecode& op) {
    constexpr int kTiles = kLeastChunk / kTileRows;
#pragma unroll 1
    while (nth * size >= end && left > 0) {
      ++index;
      enter(op, 0);
    }
    first = nth * size * kTiles;
    last = nth * size < end ? min(first + size * kTiles, list.tiles()) : 0;
  }

 private:
  __device__ void enter(const SparseDecode& op, int unit) {
    const int groups = HeadGroup::per_row(op);
    row = index / groups;
    group = HeadGroup(op, index % groups);
    list = TokenList(op, row, group.kv_head);
    size = chunk_size(list.tokens) / kLeastChunk;
    end = min(units_of(list), unit + left);
    left -= end - unit;
    nth = ceil_div(unit, size);
  }
};

/// The next chunks of a block, from the one that it adds up on as far as loading may be ahead.
struct Plan {
  static constexpr int kAhead = 4;
  Chunk chunks[2 * kAhead];

  __device__ Chunk& operator[](int n) { return chunks[n % (2 * kAhead)]; }

  /// By one thread.
  __device__ void add(const SparseDecode& op, const Share& share, int n) {
    if (n == 0) {
      (*this)[0].begin(op, share);
    } else {
      (*this)[n].follow((*this)[n - 1]);
    }
    (*this)[n].settle(op);
  }
};

/// The keys and values of a warp's tiles, in turn, on their way to its slots. In each chunk, all warps of a block have
/// as many tiles: some are empty.
template <typename Slots>
class Loader {
 public:
  __device__ Loader(const SparseDecode& op, Plan& s_plan) : op_(op), s_plan_(s_plan) {}

  /// Once the first chunks are planned. All lanes call.
  __device__ void begin() {
    tile_ = s_plan_[0].first + static_cast<int>(threadIdx.x / 32);
    look_up();
  }

  /// Begins to copy the next rows. All lanes call.
  template <typename Slot>
  __device__ void load(Slot& slot) {
    const Chunk& chunk = s_plan_[chunk_];
    if (tile_ < chunk.last) {
      const Rows& pages = values_ ? op_.v_pages : op_.k_pages;
      slot.load(pages.at<typename Slots::T>(page_, chunk.group.kv_head, in_page_), op_.head_dim);
    }
    commit_copies();
    if (values_ && chunk.is_there()) {
      tile_ += Slots::kWarps;
      if (tile_ - static_cast<int>(threadIdx.x / 32) >= chunk.last) {
        tile_ = s_plan_[++chunk_].first + static_cast<int>(threadIdx.x / 32);
      }
      look_up();
    }
    values_ = !values_;
  }

 private:
  /// Finds in memory this lane's token. Behind the end of the list it is the last one.
  __device__ void look_up() {
    const Chunk& chunk = s_plan_[chunk_];
    if (tile_ >= chunk.last) return;
    const int place = min(tile_ * kTileRows + static_cast<int>(threadIdx.x % 32), chunk.list.tokens - 1);
    page_ = chunk.list.page(place);
    in_page_ = chunk.list.slot(place);
  }

  const SparseDecode& op_;
  Plan& s_plan_;
  int chunk_ = 0, tile_, page_, in_page_;
  bool values_ = false;
};

// Partial results.

/// By what sums relative to one best score are multiplied when another takes its place.
__device__ inline float rescaling(float from, float to) { return from == to ? 1 : expf(from - to); }

/// The scores of some tokens of a head.
struct Scores {
  float best, least;
  float mass;  // relative to best

  static __device__ Scores none() { return {kNothing, -kNothing, 0}; }

  friend __device__ Scores operator+(const Scores& a, const Scores& b) {
    const float best = fmaxf(a.best, b.best);
    return {best, fminf(a.least, b.least), a.mass * rescaling(a.best, best) + b.mass * rescaling(b.best, best)};
  }

  friend __device__ Scores shuffle_xor(const Scores& scores, int distance) {
    return {cuda::shuffle_xor(scores.best, distance), cuda::shuffle_xor(scores.least, distance),
            cuda::shuffle_xor(scores.mass, distance)};
  }
};

/// Between the launches.
struct Scratch {
  int chunks, dims;  // room per head
  float* sums;       // [batch, q_heads, chunks, dims] relative to the chunk's best score
  Scores* scores;    // [batch, q_heads, chunks]

  explicit Scratch(const SparseDecode& op) : chunks(most_chunks(capacity_of(op))), dims(ceil_div(op.head_dim, 4) * 4) {}

  /// Lays the arrays out from `memory` on, and says how many bytes they take.
  int64_t place(const SparseDecode& op, void* memory) {
    const int64_t all = int64_t{op.batch} * op.q_heads * chunks;
    sums = static_cast<float*>(memory);
    scores = reinterpret_cast<Scores*>(sums + all * dims);
    return all * (dims * sizeof(float) + sizeof(Scores));
  }
};

/// What a warp has seen of its chunk. A lane has tokens 8 i + 2 (lane % 4) + 0 and 1 of each tile, and head lane / 4.
struct Running : Scores {
  __device__ Running() : Scores(none()) {}

  /// Takes a tile's scores and makes weights of them; returns by what sums are to be multiplied. Behind the first
  /// `tokens` the last of them stands again. A score that is no number makes the mass none. All lanes call.
  __device__ float take(TileScores& s_tile, int tokens) {
    const int lane = threadIdx.x % 32;
    float own[8], top = best;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      own[i] = s_tile.of[lane / 4][i / 2 * 8 + lane % 4 * 2 + i % 2];
      least = fminf(least, own[i]);
      top = fmaxf(top, own[i]);
    }
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    const float factor = rescaling(best, top);
    best = top;
    mass *= factor;
    const float level = best == kNothing ? 0 : best;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
      const float weight = token < tokens ? __expf(own[i] - level) : 0;
      mass += weight;
      s_tile.of[lane / 4][token] = weight;
    }
    return factor;
  }

  /// Of all tokens of the warp. All lanes call.
  __device__ Scores total() const {
    Scores total = *this;
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      total.mass += shuffle_xor(total.mass, distance);
      total.least = fminf(total.least, shuffle_xor(total.least, distance));
    }
    return total;
  }
};

/// What a block adds up: the sums of its warps, of one chunk at a time.
template <typename T, typename Layout>
struct Total {
  using Slots = ScanRing<T, Layout>;
  Scores scores[Slots::kWarps][kTileHeads];
  union {
    TileScores tiles[Slots::kWarps];
    float sums[Sums<T, Layout>::kCount * 32];
  };

  /// Writes the result of a chunk. All threads call.
  __device__ void write(const Scratch& scratch, int64_t first_head, int heads, int chunk, const Running& running,
                        Sums<T, Layout>& own) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto at = [&](int h) { return (first_head + h) * scratch.chunks + chunk; };
    const Scores of_warp = running.total();
    if (lane % 4 == 0) scores[warp][lane / 4] = of_warp;
    __syncthreads();
    Scores all = scores[0][lane / 4];
    for (int other = 1; other < Slots::kWarps; ++other) all = all + scores[other][lane / 4];
    if (warp == 0 && lane % 4 == 0 && lane / 4 < heads) scratch.scores[at(lane / 4)] = all;
    own.multiply_by(rescaling(running.best, all.best) / Sums<T, Layout>::kUnit);
#pragma unroll 1
    for (int turn = 0; turn < Slots::kWarps; ++turn) {
      if (warp == turn) {
#pragma unroll
        for (int i = 0; i < own.kCount; ++i) {
          if (turn > 0) own.of[i] += sums[i * 32 + lane];
          if (turn < Slots::kWarps - 1) sums[i * 32 + lane] = own.of[i];
        }
      }
      __syncthreads();
    }
    if (warp < Slots::kWarps - 1) return;
    own.visit([&](int h, int d, float sum) {
      if (h < heads && d < scratch.dims) scratch.sums[at(h) * scratch.dims + d] = sum;
    });
  }
};

template <typename T, typename Layout>
__global__ void __launch_bounds__(32 * ScanRing<T, Layout>::kWarps, kScanOccupancy<Layout>)
    attend(SparseDecode op, Scratch scratch) {
  take_turn();
  using Slots = ScanRing<T, Layout>;
  constexpr int kBlock = 32 * Slots::kWarps;
  __shared__ Plan s_plan;
  __shared__ Queries<T, Layout> s_q;
  __shared__ Total<T, Layout> s_total;
  const int thread = threadIdx.x, warp = thread / 32, groups = HeadGroup::per_row(op);
  TileScores& s_tile = s_total.tiles[warp];
  for (int i = blockIdx.x * kBlock + thread; i < op.batch * op.q_heads; i += gridDim.x * kBlock) op.support[i] = 0;
  const auto share = Share::of_block<kBlock>(op.batch * groups, [&](int index) {
    return units_of(TokenList(op, index / groups, HeadGroup(op, index % groups).kv_head));
  });
  Loader<Slots> loader(op, s_plan);
  int nth_slot = 0, queries_of = -1;
#pragma unroll 1  // so that each part is there once
  for (int n = -Plan::kAhead;; ++n) {
    if (thread == 0) s_plan.add(op, share, n + Plan::kAhead);
    if (n < 0) continue;
    if (n == 0) {
      __syncthreads();
      loader.begin();
    }
    const Chunk& chunk = s_plan[n];
    if (!chunk.is_there()) break;
    const LaneScoring scoring(op, chunk.group);
    Running running;
    Sums<T, Layout> sums;
    const int steps = 2 * ceil_div(chunk.last - chunk.first, Slots::kWarps);
#pragma unroll 1
    for (int step = n == 0 ? -Slots::kSlots : 0; step < steps; ++step) {
      auto& slot = Slots::slot(nth_slot);
      const int tile = chunk.first + step / 2 * Slots::kWarps + warp;
      const bool there = step >= 0 && tile < chunk.last, values = step % 2;
      Products scores;
      if (step == 0 && queries_of != chunk.index) {
        const QueryLoad<T, Layout, kBlock> queries(op.q, chunk.row, chunk.group, op.head_dim);
        queries.store([&](int h, int d, float q) { s_q.set(h, d, q); });
        queries_of = chunk.index;
        __syncthreads();
      }
      if (step >= 0) wait_for_copies<Slots::kSlots - 1>();
      __syncwarp();  // the other lanes' copies, too
      if (there && values) sums.add(slot, s_tile);
      if (there && !values) multiply(slot, s_q, chunk.group.heads, scores);
      __syncwarp();  // all have read
      loader.load(slot);
      if (++nth_slot == Slots::kSlots) nth_slot = 0;
      if (!there || values) continue;
      scoring.score(chunk.list, tile, scores);
      s_tile.set(scores);
      const float factor = running.take(s_tile, chunk.list.tokens - tile * kTileRows);
      if (__ballot_sync(kAllLanes, factor != 1)) sums.multiply_by(factor);
      __syncwarp();  // all have their weights
    }
    s_total.write(scratch, chunk.row * op.q_heads + chunk.group.first_head, chunk.group.heads, chunk.nth, running,
                  sums);
  }
}

constexpr int kMergeThreads = 256, kMergeDims = 32;

template <typename T>
__global__ void __launch_bounds__(kMergeThreads, 3) merge(SparseDecode op, Scratch scratch) {
  take_turn();
  constexpr int kWarps = kMergeThreads / 32;
  constexpr int kWords = kMergeDims / 4, kAtOnce = kMergeThreads / kWords;  // chunks
  __shared__ float s_sums[kWarps][kMergeDims];
  __shared__ uint32_t s_divided[kWarps];
  const int64_t row = blockIdx.z;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, part = blockIdx.x;
  const int head = blockIdx.y, kv_head = head / op.group;
  const int64_t at = row * op.q_heads + head;
  const TokenList list(op, row, kv_head);
  const int size = chunk_size(list.tokens), chunks = chunks_of(list.tokens);
  const Scores* scores = scratch.scores + at * scratch.chunks;
  Scores own = Scores::none();
  for (int n = thread; n < chunks; n += kMergeThreads) own = own + scores[n];
  const Scores all = reduce<kMergeThreads>(own, [](const Scores& a, const Scores& b) { return a + b; });
  const float best = all.best, mass = all.mass;
  const bool undefined = list.tokens > 0 && !(mass > 0);  // some score is no number

  const int first_dim = part * kMergeDims + thread % kWords * 4;
  float total[4] = {};
  if (first_dim < scratch.dims) {
    const float* sums = scratch.sums + at * scratch.chunks * scratch.dims + first_dim;
#pragma unroll 8
    for (int n = thread / kWords; n < chunks; n += kAtOnce) {
      const float4 its = *reinterpret_cast<const float4*>(sums + static_cast<int64_t>(n) * scratch.dims);
      const float factor = rescaling(scores[n].best, best);
      total[0] += factor * its.x;
      total[1] += factor * its.y;
      total[2] += factor * its.z;
      total[3] += factor * its.w;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    for (int distance = kWords; distance < 32; distance *= 2) total[i] += shuffle_xor(total[i], distance);
    if (lane < kWords) s_sums[warp][lane * 4 + i] = total[i];
  }
  __syncthreads();
  if (const int d = part * kMergeDims + lane; warp == 0 && d < op.head_dim) {
    float out = 0;
    for (int other = 0; other < kWarps; ++other) out += s_sums[other][lane];
    op.out.at<T>(row, head)[d] = from_float<T>(undefined ? kUndefined : list.tokens > 0 ? out / mass : 0);
  }

  // Of most chunks all tokens have p > 0, or none. Where it divides them, they are scored again.
  const auto has_weight = [&](float score) { return expf(score - best) / mass > 0; };
  const T* q = op.q.at<T>(row, head);
  const float slope = op.scoring.slope(head);
  int support = 0;
  for (int first = 0; first < chunks; first += kMergeThreads) {
    const int n = first + thread;
    const bool some = n < chunks && has_weight(scores[n].best), each = some && has_weight(scores[n].least);
    if (each && part == 0) support += min(size, list.tokens - n * size);
    const uint32_t divided = __ballot_sync(kAllLanes, some && !each);
    __syncthreads();
    if (lane == 0) s_divided[warp] = divided;
    __syncthreads();
#pragma unroll 1
    for (int word = 0; word < kWarps; ++word) {
      for (uint32_t mask = s_divided[word]; mask; mask &= mask - 1) {
        const int begin = (first + word * 32 + __ffs(mask) - 1) * size, end = min(begin + size, list.tokens);
        for (int place = begin + part * kWarps + warp; place < end; place += gridDim.x * kWarps) {
          const T* k = list.row<T>(op.k_pages, kv_head, place);
          float product = 0;
          for (int i = lane; i < op.head_dim; i += 32) product += to_float(q[i]) * to_float(k[i]);
          const auto distance = static_cast<float>(list.position(place) - (list.seq_len - 1));
          support += has_weight(fmaf(slope, distance, op.scoring.scale * sum<32>(product))) && lane == 0;
        }
      }
    }
  }
  support = sum<kMergeThreads>(support);
  if (thread > 0) return;
  if (support > 0) atomicAdd(op.support + at, support);
  if (part > 0) return;
  op.tau[at] = undefined ? kUndefined : list.tokens > 0 ? best + logf(mass) : 0;
  if (head % op.group == 0) op.tokens[row * op.kv_heads + kv_head] = list.tokens;
}

}  // namespace

int64_t softmax_workspace_bytes(const SparseDecode& op) { return Scratch(op).place(op, nullptr); }

void softmax_decode(const SparseDecode& op, void* workspace, cudaStream_t stream) {
  const char* name = op.selection ? "sparse_decode" : "dense_decode";
  const bool vectors = in_vectors(op.k_pages, op.dtype, op.head_dim) && in_vectors(op.v_pages, op.dtype, op.head_dim);
  Scratch scratch(op);
  scratch.place(op, workspace);
  dispatch_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_layout(op.head_dim, vectors, [&](auto layout) {
      using Layout = decltype(layout);
      using Slots = ScanRing<T, Layout>;
      const int64_t units = int64_t{op.batch} * HeadGroup::per_row(op) * ceil_div(capacity_of(op), kLeastChunk);
      const auto blocks = static_cast<int>(std::clamp<int64_t>(units, 1, kScanBlocks<Layout> * multiprocessors()));
      launch(name, attend<T, Layout>, {dim3(blocks), 32 * Slots::kWarps, 1, Slots::kBytes}, stream, op, scratch);
    });
    launch(name, merge<T>, {dim3(ceil_div(op.head_dim, kMergeDims), op.q_heads, op.batch), kMergeThreads}, stream, op,
           scratch);
  });
}

}  // namespace entmaxkv::cuda
