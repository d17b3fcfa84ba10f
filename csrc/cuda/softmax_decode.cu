// sparse_decode and dense_decode on the GPU where alpha = 1.
//   s_i = scale q . k_i + bias,  p_i = exp(s_i - best) / mass,  best = max s,  mass = sum_i exp(s_i - best)
//   out = sum_i p_i v_i
// Every key and every value is read once per group of up to 8 query heads. Values of tokens with weight 0 are read,
// too: if one is infinite, the output is NaN.
//   1. attend: the blocks of a fixed grid divide the chunks of all lists (chunks.cuh) evenly. A warp multiplies tiles
//      of 32 tokens, first keys and then values. It keeps the best score of the chunk so far, and the mass and the
//      value sums relative to that score. The block adds up its warps' results for each chunk.
//   2. merge: a block per (row, query head, 32 dimensions) adds up the chunks in order, and counts the tokens with
//      weight. It scores a chunk's tokens again if only some of them have weight.
#include "sparse_decode/chunks.cuh"
#include "sparse_decode/softmax_decode.cuh"
#include "sparse_decode/value_sums.cuh"

namespace entmaxkv::cuda {

namespace {

/// Returns the factor that turns sums relative to the score `from` into sums relative to the score `to`.
__device__ inline float rescaling(float from, float to) { return from == to ? 1 : expf(from - to); }

/// Best score, least score and mass of some tokens of a head. Adding two gives the Scores of all their tokens.
struct Scores {
  float best, least;
  float mass;  // sum_i exp(s_i - best)

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

/// Intermediate results in global memory that `attend` writes and `merge` reads.
struct Scratch {
  int chunks, dims;  // most chunks of a list; head_dim rounded up to whole float4
  float* sums;       // [batch, q_heads, chunks, dims] value sums relative to the chunk's best score
  Scores* scores;    // [batch, q_heads, chunks]

  explicit Scratch(const SparseDecode& op) : chunks(most_chunks(capacity_of(op))), dims(ceil_div(op.head_dim, 4) * 4) {}

  /// Places the arrays one after the other from `memory` on. Returns how many bytes they take.
  int64_t place(const SparseDecode& op, void* memory) {
    const int64_t all = int64_t{op.batch} * op.q_heads * chunks;
    sums = static_cast<float*>(memory);
    scores = reinterpret_cast<Scores*>(sums + all * dims);
    return all * (dims * sizeof(float) + sizeof(Scores));
  }
};

/// The scores of a warp's tokens of a chunk so far. A lane has tokens 8 i + 2 (lane % 4) and 8 i + 2 (lane % 4) + 1 of
/// each tile, and head lane / 4.
struct Running : Scores {
  __device__ Running() : Scores(none()) {}

  /// Adds a tile's scores and replaces them by weights relative to the new best score. Returns the factor by which the
  /// value sums so far must be multiplied. Scores behind the first `tokens` repeat the last token's; their weight is 0.
  /// A NaN score makes the mass NaN. All lanes call.
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
      const float weight = token < tokens ? expf(own[i] - level) : 0;
      mass += weight;
      s_tile.of[lane / 4][token] = weight;
    }
    return factor;
  }

  /// Returns the scores of all tokens of the warp for head lane / 4. All lanes call.
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

/// The shared memory of `attend` for tiles, and for the sums of a block's warps over one chunk.
template <typename T, typename Layout>
struct Total {
  using Slots = ScanRing<T, Layout>;
  Scores scores[Slots::kWarps][kTileHeads];
  union {
    TileScores tiles[Slots::kWarps];
    float sums[Sums<T, Layout>::kCount * 32];
  };

  /// Adds up the warps' results of a chunk and writes the sum to `scratch`. All threads call.
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
  wait_for_previous_kernel();
  using Slots = ScanRing<T, Layout>;
  constexpr int kBlock = 32 * Slots::kWarps;
  __shared__ Plan s_plan;
  __shared__ Queries<T, Layout> s_q;
  __shared__ Total<T, Layout> s_total;
  const int thread = threadIdx.x, warp = thread / 32, groups = HeadGroup::per_row(op);
  TileScores& s_tile = s_total.tiles[warp];
  for (int i = blockIdx.x * kBlock + thread; i < op.batch * op.q_heads; i += gridDim.x * kBlock) op.support[i] = 0;
  const auto work = WorkSplit::of_block<kBlock>(op.batch * groups, [&](int index) {
    return units_of(TokenList(op, index / groups, HeadGroup(op, index % groups).kv_head));
  });
  Loader<Slots> loader(op, s_plan);
  int nth_slot = 0, queries_of = -1;
#pragma unroll 1  // one copy of the code of each step
  for (int n = -Plan::kAhead;; ++n) {
    if (thread == 0) s_plan.add(op, work, n + Plan::kAhead);
    if (n < 0) continue;
    if (n == 0) {
      __syncthreads();
      loader.begin();
    }
    const ListChunk& chunk = s_plan[n];
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
      __syncwarp();  // the other lanes' copies have arrived, too
      if (there && values) sums.add(slot, s_tile);
      if (there && !values) multiply(slot, s_q, chunk.group.heads, scores);
      __syncwarp();  // all lanes have read the slot
      loader.load(slot);
      if (++nth_slot == Slots::kSlots) nth_slot = 0;
      if (!there || values) continue;
      scoring.score(chunk.list, tile, scores);
      s_tile.set(scores);
      const float factor = running.take(s_tile, chunk.list.tokens - tile * kTileRows);
      if (__ballot_sync(kAllLanes, factor != 1)) sums.multiply_by(factor);
      __syncwarp();  // all lanes have written their weights
    }
    s_total.write(scratch, chunk.row * op.q_heads + chunk.group.first_head, chunk.group.heads, chunk.nth, running,
                  sums);
  }
}

constexpr int kMergeThreads = 256, kMergeDims = 32;

template <typename T>
__global__ void __launch_bounds__(kMergeThreads, 3) merge(SparseDecode op, Scratch scratch) {
  wait_for_previous_kernel();
  constexpr int kWarps = kMergeThreads / 32;
  constexpr int kWords = kMergeDims / 4, kAtOnce = kMergeThreads / kWords;  // chunks that the block adds at once
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
  const bool undefined = list.tokens > 0 && !(mass > 0);  // some score is NaN

  const int first_dim = part * kMergeDims + thread % kWords * 4;
  float total[4] = {};
  if (first_dim < scratch.dims) {
    const float* sums = scratch.sums + at * scratch.chunks * scratch.dims + first_dim;
#pragma unroll 8
    for (int n = thread / kWords; n < chunks; n += kAtOnce) {
      const float4 chunk_sums = *reinterpret_cast<const float4*>(sums + static_cast<int64_t>(n) * scratch.dims);
      const float factor = rescaling(scores[n].best, best);
      total[0] += factor * chunk_sums.x;
      total[1] += factor * chunk_sums.y;
      total[2] += factor * chunk_sums.z;
      total[3] += factor * chunk_sums.w;
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

  // In most chunks either all tokens have p > 0 or none has. Other chunks are scored again. The rounding differs from
  // the first time, so `rounding` is added to a score: a token in doubt counts.
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
          float product = 0, size_of_terms = 0;
          for (int i = lane; i < op.head_dim; i += 32) {
            const float term = op.scoring.scale * to_float(q[i]) * to_float(k[i]);
            product += term;
            size_of_terms += fabsf(term);
          }
          const float bias = slope * static_cast<float>(list.position(place) - (list.seq_len - 1));
          const float rounding = (op.head_dim + 4) * 0x1p-24f * (sum<32>(size_of_terms) + fabsf(bias));
          support += has_weight(sum<32>(product) + bias + rounding) && lane == 0;
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
