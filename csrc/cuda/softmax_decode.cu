// sparse_decode and dense_decode on the GPU where alpha = 1.
//   s_i = scale q . k_i + bias,  p_i = exp(s_i - best) / mass,  best = max s,  mass = sum_i exp(s_i - best)
//   out = sum_i p_i v_i
// Every key and every value is read once per group of up to 8 query heads. Values of tokens with weight 0 are read,
// too: if one is infinite, the output is NaN.
//   1. attend: the warps of a fixed grid share the chunks of all lists (chunks.cuh). A warp multiplies tiles of 32
//      tokens, first keys and then values. It keeps the best score of the chunk so far, and the mass and the value sums
//      relative to that score.
//   2. merge: a block per (row, query head, some dimensions) adds up the chunks in a fixed order, and counts the tokens
//      with weight. It scores a chunk's tokens again if only some of them have weight.
#include "common/fast_math.cuh"
#include "sparse_decode/chunks.cuh"
#include "sparse_decode/softmax_decode.cuh"
#include "sparse_decode/value_sums.cuh"

namespace entmaxkv::cuda {

namespace {

/// Returns e^x. The relative error grows with |x|, but the result is added to others of which one is 1.
__device__ inline float exponential(float x) { return power_of_two(1.4426950408889634f * x); }

/// Returns the factor that turns sums relative to the score `from` into sums relative to the score `to`.
__device__ inline float rescaling(float from, float to) { return from == to ? 1 : exponential(from - to); }

/// Best score, least score and mass of some tokens of a head.
struct Scores {
  float best, least;
  float mass;  // sum_i exp(s_i - best)

  static __device__ Scores none() { return {kNothing, -kNothing, 0}; }
};

/// Intermediate results in global memory that `attend` writes and `merge` reads.
struct Scratch {
  int chunks, dims;  // most chunks of a list; head_dim rounded up to whole float4
  float* sums;       // [batch, q_heads, chunks, dims] value sums relative to the chunk's best score
  Scores* scores;    // [batch, q_heads, chunks]
  uint32_t* taken;   // a counter of the chunks that warps have taken (Loader)
  bool is_long;      // keys and values are a long stream (read_once)
  bool q_vectors;    // queries can be read 16 bytes at a time

  explicit Scratch(const SparseDecode& op)
      : chunks(most_chunks(capacity_of(op))),
        dims(ceil_div(op.head_dim, 4) * 4),
        is_long(2 * key_bytes(op) >= kLongStream),
        q_vectors(in_vectors(op.q, op.dtype, op.head_dim)) {}

  /// Places the arrays one after the other from `memory` on. Returns how many bytes they take.
  int64_t place(const SparseDecode& op, void* memory) {
    const int64_t all = int64_t{op.batch} * op.q_heads * chunks;
    sums = static_cast<float*>(memory);
    scores = reinterpret_cast<Scores*>(sums + all * dims);
    taken = reinterpret_cast<uint32_t*>(scores + all);
    return all * (dims * sizeof(float) + sizeof(Scores)) + sizeof(*taken);
  }
};

/// The scores of a chunk's tokens so far: those that a lane has in each tile (TileScores).
struct Running : Scores {
  __device__ Running() : Scores(none()) {}

  /// Adds a tile's scores and replaces them by weights relative to the new best score. Returns the factor by which the
  /// value sums so far must be multiplied. Scores behind the first `tokens` repeat the last token's; their weight is 0.
  /// A NaN score makes the mass NaN. All lanes call.
  __device__ float take(TileScores& scores, int tokens) {
    float top = best;
#pragma unroll
    for (const float score : scores.of) {
      least = fminf(least, score);
      top = fmaxf(top, score);
    }
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    const float factor = rescaling(best, top);
    best = top;
    mass *= factor;
    const float level = best == kNothing ? 0 : best;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float weight = exponential(scores.of[i] - level);
      scores.of[i] = TileScores::token(i) < tokens ? weight : 0;
      mass += scores.of[i];
    }
    return factor;
  }

  /// Returns the scores of all tokens for head lane / 4. All lanes call.
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

/// Turns the products of a list's tiles with head lane / 4 into scores: scale and ALiBi bias.
struct HeadScoring {
  float scale, slope = 0;
  bool biased;

  __device__ HeadScoring(const SparseDecode& op, const HeadGroup& group)
      : scale(op.scoring.scale), biased(op.scoring.alibi_slopes) {
    const int head = threadIdx.x % 32 / 4;
    if (head < group.heads) slope = op.scoring.slope(group.first_head + head);
  }

  __device__ void score(const TokenList& list, int tile, TileScores& scores) const {
#pragma unroll
    for (float& score : scores.of) score *= scale;
    if (!biased) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int place = min(tile * kTileRows + TileScores::token(i), list.tokens - 1);
      scores.of[i] += slope * static_cast<float>(list.position(place) - (list.seq_len - 1));
    }
  }
};

template <typename Memory>
__global__ void __launch_bounds__(32 * kMostWarps<Memory>, 1)
    attend(SparseDecode op, Scratch scratch, bool by_counter) {
  wait_for_previous_kernel();
  using T = typename Memory::T;
  using Layout = typename Memory::Layout;
  Memory& s_warp = reinterpret_cast<Memory*>(dynamic_shared())[threadIdx.x / 32];
  Loader<Memory> loader(op, by_counter ? scratch.taken : nullptr, s_warp, read_once(scratch.is_long));
  int nth_slot = 0;         // the slot that is read next
  int64_t queries_of = -1;  // the first query head in shared memory, counted over all rows
#pragma unroll 1            // one copy of the code of each step
  for (int n = 0;; ++n) {
    const Chunk& chunk = s_warp.chunk(n);
    if (!chunk.is_there()) break;
    const HeadScoring scoring(op, chunk.group);
    Running running;
    Sums<T, Layout> sums;
    TileScores scores;  // of the tile whose keys were read last
    const int64_t first_head = chunk.row * op.q_heads + chunk.group.first_head;
    const int steps = 2 * (chunk.last - chunk.first);
#pragma unroll 1
    for (int step = n == 0 ? -Memory::kSlots : 0; step < steps; ++step) {
      auto& slot = s_warp.slots[nth_slot];
      const int tile = chunk.first + step / 2;
      const bool keys = step >= 0 && step % 2 == 0;
      if (step == 0 && queries_of != first_head) {
        load_queries(op.q, chunk.row, chunk.group, op.head_dim, scratch.q_vectors, s_warp.q);
        queries_of = first_head;
      }
      wait_for_copies<Memory::kSlots - 1>();
      __syncwarp();  // the other lanes' copies have arrived, too
      if (keys) {
        scores = tile_products(slot, s_warp.q, chunk.group.heads, s_warp.exchange);
      } else if (step >= 0) {
        sums.add(slot, scores, s_warp.exchange);
      }
      __syncwarp();  // all lanes have read the slot
      loader.load(slot);
      if (++nth_slot == Memory::kSlots) nth_slot = 0;
      if (!keys) continue;
      scoring.score(chunk.list, tile, scores);
      const float factor = running.take(scores, chunk.list.tokens - tile * kTileRows);
      if (__ballot_sync(kAllLanes, factor != 1)) sums.multiply_by(factor);
    }
    const int lane = threadIdx.x % 32;
    const int64_t at = first_head * scratch.chunks + chunk.nth;
    const Scores total = running.total();
    if (lane % 4 == 0 && lane / 4 < chunk.group.heads) scratch.scores[at + lane / 4 * scratch.chunks] = total;
    sums.write(scratch.sums + at * scratch.dims, int64_t{scratch.chunks} * scratch.dims, chunk.group.heads,
               scratch.dims);
  }
  // merge adds to the support.
  if (threadIdx.x < 32) {
    for (int i = blockIdx.x * 32 + threadIdx.x; i < op.batch * op.q_heads; i += gridDim.x * 32) op.support[i] = 0;
  }
}

constexpr int kMergeThreads = 256;

/// How the threads of `merge` divide a head: share n of `count` shares adds up chunks n, n + count, ... Few chunks make
/// few shares, so that a block has more dimensions: then the blocks of a large batch are no more than run at once. The
/// grid follows the capacity, so a shorter list may leave blocks without dimensions.
struct MergeShares {
  int count;

  __host__ __device__ explicit MergeShares(int chunks) : count(chunks <= kTargetChunks ? 8 : 32) {}

  /// Returns how many times four dimensions a block has.
  __host__ __device__ int words() const { return kMergeThreads / count; }
};

__device__ inline float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ inline float4 operator*(float factor, const float4& x) {
  return {factor * x.x, factor * x.y, factor * x.z, factor * x.w};
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads, 4) merge(SparseDecode op, Scratch scratch) {
  wait_for_previous_kernel();
  constexpr int kWarps = kMergeThreads / 32;
  constexpr int kBatch = 8;  // chunks whose sums a thread loads at once
  __shared__ float s_factors[kMergeThreads];
  __shared__ float4 s_sums[kWarps][32];
  __shared__ uint32_t s_divided[kWarps];
  const int64_t row = blockIdx.z;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, part = blockIdx.x;
  const int head = blockIdx.y, kv_head = head / op.group;
  const int64_t at = row * op.q_heads + head;
  const TokenList list(op, row, kv_head);
  const int size = chunk_size(list.tokens), chunks = ceil_div(list.tokens, size);
  const Scores* scores = scratch.scores + at * scratch.chunks;
  const MergeShares shares(chunks);
  const int words = shares.words(), share = thread / words, first_dim = (part * words + thread % words) * 4;
  const float* sums = scratch.sums + at * scratch.chunks * scratch.dims + first_dim;
  float4 batch[kBatch];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int n = first + i * shares.count;
      batch[i] = {0, 0, 0, 0};
      if (n < chunks && first_dim < scratch.dims) {
        batch[i] = *reinterpret_cast<const float4*>(sums + static_cast<int64_t>(n) * scratch.dims);
      }
    }
  };
  load(share);  // these are on their way while the factors are found
  float best = kNothing, least = -kNothing;
#pragma unroll 1
  for (int n = thread; n < chunks; n += kMergeThreads) {
    best = fmaxf(best, scores[n].best);
    least = fminf(least, scores[n].least);
  }
  best = reduce<kMergeThreads>(best, [](float a, float b) { return fmaxf(a, b); });
  least = reduce<kMergeThreads>(least, [](float a, float b) { return fminf(a, b); });
  float mass = 0;
  float4 total = {0, 0, 0, 0};
#pragma unroll 1
  for (int first = 0; first < chunks; first += kMergeThreads) {
    __syncthreads();  // the factors of the chunks before these have been read
    s_factors[thread] = 0;
    if (const int n = first + thread; n < chunks) {
      s_factors[thread] = rescaling(scores[n].best, best);
      mass += s_factors[thread] * scores[n].mass;
    }
    __syncthreads();
    const int end = min(chunks - first, kMergeThreads);
#pragma unroll 1
    for (int n = share; n < end; n += kBatch * shares.count) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) total = total + s_factors[n + i * shares.count] * batch[i];
      load(first + n + kBatch * shares.count);
    }
  }
  mass = sum<kMergeThreads>(mass);
#pragma unroll 1
  for (int distance = words; distance < 32; distance *= 2) total = total + shuffle_xor(total, distance);
  s_sums[warp][lane] = total;
  __syncthreads();
  const bool undefined = list.tokens > 0 && !(mass > 0);  // some score is NaN
  if (thread < words) {
#pragma unroll
    for (int other = 1; other < kWarps; ++other) total = total + s_sums[other][lane];
    const float of_dims[] = {total.x, total.y, total.z, total.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float out = undefined ? kUndefined : list.tokens > 0 ? of_dims[i] / mass : 0;
      if (first_dim + i < op.head_dim) op.out.at<T>(row, head)[first_dim + i] = from_float<T>(out);
    }
  }
  if (part == 0 && thread == 0) {
    op.tau[at] = undefined ? kUndefined : list.tokens > 0 ? best + logf(mass) : 0;
    if (head % op.group == 0) op.tokens[row * op.kv_heads + kv_head] = list.tokens;
  }

  const auto has_weight = [&](float score) { return expf(score - best) / mass > 0; };
  if (list.tokens == 0 || has_weight(least)) {  // nearly always
    if (part == 0 && thread == 0) op.support[at] = list.tokens;
    return;
  }
  // In most chunks either all tokens have p > 0 or none has. Other chunks are scored again. The rounding differs from
  // the first time, so `rounding` is added to a score: a token in doubt counts.
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
  if (thread == 0 && support > 0) atomicAdd(op.support + at, support);
}

}  // namespace

int64_t softmax_workspace_bytes(const SparseDecode& op) { return Scratch(op).place(op, nullptr); }

void softmax_decode(const SparseDecode& op, void* workspace, cudaStream_t stream) {
  const char* name = op.selection ? "sparse_decode" : "dense_decode";
  const bool vectors = in_vectors(op.k_pages, op.dtype, op.head_dim) && in_vectors(op.v_pages, op.dtype, op.head_dim);
  Scratch scratch(op);
  scratch.place(op, workspace);
  const int64_t chunks = std::max<int64_t>(int64_t{op.batch} * HeadGroup::per_row(op) * scratch.chunks, 1);
  dispatch_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_layout(op.head_dim, vectors, [&](auto layout) {
      using Memory = WarpMemory<T, decltype(layout)>;
      const int most =
          std::min(device_property(cudaDevAttrMaxSharedMemoryPerBlockOptin) / int{sizeof(Memory)}, kMostWarps<Memory>);
      const int blocks = static_cast<int>(std::min<int64_t>(chunks, multiprocessors()));
      // Where each warp takes few chunks, even parts cost less than the memset.
      const int64_t rounds = (chunks - 1) / (int64_t{blocks} * most) + 1;
      const bool by_counter = rounds > 2;
      const int warps = by_counter ? most : static_cast<int>((chunks - 1) / (blocks * rounds) + 1);
      if (by_counter) check(name, cudaMemsetAsync(scratch.taken, 0, sizeof(*scratch.taken), stream));
      launch(name, attend<Memory>, {dim3(blocks), 32 * warps, 1, warps * int{sizeof(Memory)}}, stream, op, scratch,
             by_counter);
    });
    const int parts = ceil_div(scratch.dims, MergeShares(scratch.chunks).words() * 4);
    launch(name, merge<T>, {dim3(parts, op.q_heads, op.batch), kMergeThreads}, stream, op, scratch);
  });
}

}  // namespace entmaxkv::cuda
