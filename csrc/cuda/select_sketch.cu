// select_sketch on the GPU.
//   q, sketch [pages, kv_heads, ...] -> selected tokens [batch, kv_heads, max_selected] ascending, counts
//   1. scan: a warp bounds the scores of a chunk of tokens by plane 0 of their codes, for up to 4 query heads, keeps
//   the
//      bounds in fp16, rounded up, and names the token with the highest one.
//   2. find_floors: a block per query head scores these tokens exactly; their threshold is at most that of all tokens.
//   3. refine: a warp looks at a segment of the bounds. What is above the floor of its head is bounded anew, by both
//      planes; what still is gets a bit.
//   4. list: the tokens of these bits.
//   If no more than max_tokens may be listed, cap comes before that: the bits of whole steps of merit go.
// Products of codes and queries are those of whole numbers, on tensor cores: tokens as rows, as columns the high and
// the low 7 bits of the numbers of each head. A dot product does not care for the order of its dimensions: a lane
// multiplies a run of successive bytes of a row of codes.
#include "kernels.h"
#include "key_sketch.cuh"
#include "share.cuh"
#include "tile.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kHeads = 4;  // query heads that share one reading of the codes
constexpr int kScanThreads = 128, kScanWarps = kScanThreads / 32;
template <int kWords>
constexpr int kOccupancy = kWords <= 2 ? 4 : 3;  // blocks that share a multiprocessor
constexpr int kTokens = 64;                      // that a warp multiplies together: 4 matrices of 16 rows
constexpr int kMostChunks = 512;
constexpr int kSegment = 512;      // tokens
constexpr int kListSegments = 16;  // of a block
constexpr int kBins = 256;         // of merit; nothing is in the last one

/// Tokens of a chunk of a row.
__device__ int chunk_of(int seq_len) { return max(1, ceil_div(ceil_div(seq_len, kMostChunks), kTokens)) * kTokens; }

/// Intermediate results. Every length has room for whole segments.
struct Scratch {
  int capacity;       // tokens
  __half* uppers;     // [batch, q_heads, capacity]
  int32_t* bests;     // [batch, q_heads, kMostChunks]
  float* floors;      // [batch, q_heads]
  uint32_t* marks;    // [batch, kv_heads, capacity / 32]
  int32_t* marked;    // [batch, kv_heads, segments]
  uint8_t* merits;    // [batch, kv_heads, capacity], if capped
  int32_t* at_merit;  // [batch, kv_heads, kBins], if capped

  explicit Scratch(const SelectSketch& op) : capacity(ceil_div(op.max_pages * op.page_size, kSegment) * kSegment) {}

  __host__ __device__ int segments() const { return capacity / kSegment; }

  static bool is_capped(const SelectSketch& op) { return op.selection.max_selected < op.max_pages * op.page_size; }

  /// Places all of it from `memory` on; returns how many bytes that are.
  int64_t place(const SelectSketch& op, void* memory) {
    auto* next = static_cast<char*>(memory);
    const auto take = [&](auto*& to, int64_t count) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(next);
      next += (count * static_cast<int64_t>(sizeof(*to)) + 255) / 256 * 256;
    };
    const int64_t heads = int64_t{op.batch} * op.q_heads, lists = int64_t{op.batch} * op.kv_heads;
    take(uppers, heads * capacity);
    take(bests, heads * kMostChunks);
    take(floors, heads);
    take(marks, lists * capacity / 32);
    take(marked, lists * segments());
    take(at_merit, is_capped(op) ? lists * kBins : 0);
    take(merits, is_capped(op) ? lists * capacity : 0);
    if (!is_capped(op)) at_merit = nullptr, merits = nullptr;
    return next - static_cast<char*>(memory);
  }
};

/// The query heads of a block: of a KV head, up to kHeads.
struct Heads {
  int64_t row;
  int kv_head, first, count;

  static __host__ __device__ int parts(const Sizes& sizes) { return ceil_div(sizes.group, kHeads); }

  __device__ Heads() {}

  __device__ Heads(const Sizes& sizes, int64_t row, int kv_head, int part)
      : row(row),
        kv_head(kv_head),
        first(kv_head * sizes.group + part * kHeads),
        count(min(kHeads, sizes.group - part * kHeads)) {}
};

/// A query times the scale.
__device__ Rotated rotated(const SelectSketch& op, int64_t row, int head) {
  switch (op.dtype) {
    case Dtype::kFloat16:
      return {op.q.at<__half>(row, head), op.head_dim, op.scoring.scale};
    case Dtype::kBFloat16:
      return {op.q.at<__nv_bfloat16>(row, head), op.head_dim, op.scoring.scale};
    default:
      return {op.q.at<float>(row, head), op.head_dim, op.scoring.scale};
  }
}

/// Queries as whole numbers.
struct Numbers {
  static constexpr int kColumns = 8;  // the high parts of kHeads, then the low ones
  alignas(16) int8_t values[kColumns][sketch::kMaxDims];
  sketch::QueryCode codes[kHeads];

  /// All threads of a block of kScanThreads call.
  __device__ void set(const SelectSketch& op, const Heads& heads) {
    static_assert(kScanWarps == kHeads);
    const int h = threadIdx.x / 32, lane = threadIdx.x % 32, dims = sketch::dims_of(op.head_dim);
    __syncthreads();  // the numbers of earlier heads have been read
    const bool there = h < heads.count;
    const Rotated r = rotated(op, heads.row, heads.first + (there ? h : 0));
    const float of_head = sketch::unit_of(r.largest()), norm = r.norm();
    const float per_unit = of_head > 0 && there ? 1 / of_head : 0;
    int own_sum = 0;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < Rotated::kOwn; ++i) {
      if (32 * i >= dims) break;
      const float number = fminf(fmaxf(rintf(r.of[i] * per_unit), -sketch::QueryCode::kMost), sketch::QueryCode::kMost);
      const float distance = r.of[i] - number * of_head;
      squares = fmaf(distance, distance, squares);
      const int whole = static_cast<int>(number), high = (whole + 64) >> 7;
      values[h][32 * i + lane] = static_cast<int8_t>(high);
      values[kHeads + h][32 * i + lane] = static_cast<int8_t>(whole - 128 * high);
      own_sum += whole;
    }
    own_sum = __reduce_add_sync(kAllLanes, own_sum);
    const float distance = sqrtf(sum<32>(squares));
    if (lane == 0) codes[h] = sketch::QueryCode(of_head, own_sum, norm, distance, dims, op.certain);
    __syncthreads();
  }
};

/// C += A B of 16 rows of unsigned and 8 columns of signed bytes, over 32 dimensions. All lanes call.
__device__ void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef EMULATE_CUDA
  emulation::multiply_bytes(c, a, b0, b1);  // tests/emulation
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// What a lane does of the product of kTokens tokens: it multiplies kWords words of each of the rows of its tokens, and
/// gets the products of four successive ones with two heads.
///   lane = 4 g + t; row r of matrix i is token 4 r + i; a lane multiplies rows g and g + 8; t < 2 gets row g, others
///   row g + 8, of heads 2 (t % 2) and 2 (t % 2) + 1.
template <int kWords>
struct Lane {
  static constexpr int kFragments = 4 * kWords;
  uint32_t fragments[kFragments];  // of the query numbers: one column's, four dimensions each

  static __device__ int part() { return threadIdx.x % 4; }
  static __device__ int row(int which) { return static_cast<int>(threadIdx.x % 32) / 4 + 8 * which; }
  static __device__ int own_row() { return row(part() / 2); }
  static __device__ int head(int j) { return part() % 2 * 2 + j; }

  __device__ explicit Lane(const Numbers& numbers) {
    const int8_t* column = numbers.values[threadIdx.x % 32 / 4];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int byte = 4 * (kWords * part() + f / 4);
      fragments[f] = *reinterpret_cast<const uint32_t*>(column + sketch::coordinate(byte, f % 4));
    }
  }

  /// The products of one plane: words[w][m] is word m of this lane's part of row(w). All lanes call.
  __device__ void multiply(const uint32_t (&words)[2][kWords], int (&products)[2]) const {
    int c[4] = {};
#pragma unroll
    for (int f = 0; f < kFragments; f += 2) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int nth = f + i / 2;
        a[i] = words[i % 2][nth / 4] >> 2 * (nth % 4) & 0x03030303u;
      }
      multiply_bytes(c, a, fragments[f], fragments[f + 1]);
    }
    // Columns 0 ... 3 are high parts, 4 ... 7 low ones: lane ^ 2 has the other part of this lane's row.
    const bool lower = part() < 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int got = __shfl_xor_sync(kAllLanes, lower ? c[2 + j] : c[j], 2);
      products[j] = lower ? 128 * c[j] + got : 128 * got + c[2 + j];
    }
  }
};

template <int kWords>
__device__ void load_words(uint32_t (&to)[kWords], const uint8_t* from) {
  if constexpr (kWords % 4 == 0) {
    const uint4 word = __ldg(reinterpret_cast<const uint4*>(from));
    to[0] = word.x, to[1] = word.y, to[2] = word.z, to[3] = word.w;
  } else if constexpr (kWords == 2) {
    const auto word = __ldg(reinterpret_cast<const uint2*>(from));
    to[0] = word.x, to[1] = word.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = __ldg(reinterpret_cast<const uint32_t*>(from) + i);
  }
}

/// Where the sketch of a row's tokens is.
struct Pages {
  const Sketch& sketch;
  const int32_t* table;
  int kv_head, kv_heads, page_size, page_bits, row_bytes;

  __device__ Pages(const SelectSketch& op, int64_t row, int kv_head)
      : sketch(op.sketch),
        table(op.page_table.row(row)),
        kv_head(kv_head),
        kv_heads(op.kv_heads),
        page_size(op.page_size),
        page_bits(__ffs(op.page_size) - 1),
        row_bytes(sketch::row_bytes(op.head_dim)) {}

  __device__ int64_t page_head(int token) const { return int64_t{table[token >> page_bits]} * kv_heads + kv_head; }
  __device__ int slot(int token) const { return token & (page_size - 1); }

  __device__ const uint8_t* codes(int64_t page_head, int token, int plane) const {
    return sketch.plane(page_head, plane, page_size, row_bytes) + slot(token) * row_bytes;
  }
  __device__ const uint8_t* norms(int64_t page_head, int token, int which) const {
    return sketch.norm(page_head, which, page_size) + slot(token);
  }
};

/// The codes of kTokens successive tokens, and scale and coarse norm of a lane's four.
template <int kWords>
struct Coarse {
  uint32_t words[4][2][kWords];
  uint32_t scales, norms;

  /// Behind the last token, whatever there is in its page.
  __device__ void load(const Pages& pages, int first, int last) {
    int64_t page_heads[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const int token = first + 4 * Lane<kWords>::row(w);
      page_heads[w] = pages.page_head(min(token, last));
      const uint8_t* codes = pages.codes(page_heads[w], token, 0) + 4 * kWords * Lane<kWords>::part();
#pragma unroll
      for (int i = 0; i < 4; ++i) load_words<kWords>(words[i][w], codes + i * pages.row_bytes);
    }
    const int own = first + 4 * Lane<kWords>::own_row();
    const int64_t page_head = Lane<kWords>::part() < 2 ? page_heads[0] : page_heads[1];
    scales = __ldg(reinterpret_cast<const uint32_t*>(pages.norms(page_head, own, 0)));
    norms = __ldg(reinterpret_cast<const uint32_t*>(pages.norms(page_head, own, 1)));
  }
};

__device__ int byte_of(uint32_t word, int nth) { return static_cast<int>(word >> 8 * nth & 255); }

/// The token of the highest bound so far.
struct Best {
  float upper = kNothing;
  int token = -1;

  __device__ void take(const Best& other) {
    if (other.upper > upper || (other.upper == upper && other.token >= 0 && other.token < token)) *this = other;
  }
};

template <int kWords>
__global__ void __launch_bounds__(kScanThreads, kOccupancy<kWords>) scan(SelectSketch op, Scratch scratch) {
  take_turn();
  __shared__ Numbers s_numbers;
  const int parts = Heads::parts(op), lists = op.batch * op.kv_heads * parts;
  const auto chunks_of = [&](int list) {
    const int seq_len = length_of(op, list / (op.kv_heads * parts));
    return ceil_div(seq_len, chunk_of(seq_len));
  };
  const auto units_of = [&](int list) { return ceil_div(chunks_of(list), kScanWarps); };
  const auto share = Share::of_block<kScanThreads>(lists, units_of);
  int unit = share.item, left = share.items;
#pragma unroll 1
  for (int list = share.list; left > 0; ++list, unit = 0) {
    const int of_list = min(units_of(list) - unit, left);
    if (of_list <= 0) continue;
    left -= of_list;
    const Heads heads(op, list / (op.kv_heads * parts), list / parts % op.kv_heads, list % parts);
    s_numbers.set(op, heads);
    const Lane<kWords> lane(s_numbers);
    const Pages pages(op, heads.row, heads.kv_head);
    const int seq_len = length_of(op, heads.row), chunk = chunk_of(seq_len), last = seq_len - 1;
    const int64_t first_head = heads.row * op.q_heads + heads.first;
    const sketch::QueryCode codes[2] = {s_numbers.codes[lane.head(0)], s_numbers.codes[lane.head(1)]};
    float slopes[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      slopes[j] = lane.head(j) < heads.count ? op.scoring.slope(heads.first + lane.head(j)) : 0;
    }
#pragma unroll 1
    for (int nth = unit * kScanWarps + static_cast<int>(threadIdx.x / 32); nth < (unit + of_list) * kScanWarps;
         nth += kScanWarps) {
      const int begin = nth * chunk, end = min(begin + chunk, seq_len);
      if (begin >= end) break;
      Best bests[2];
      Coarse<kWords> next;
      next.load(pages, begin, last);
#pragma unroll 1
      for (int first = begin; first < end; first += kTokens) {
        const Coarse<kWords> coarse = next;
        if (first + kTokens < end) next.load(pages, first + kTokens, last);
        const int own = first + 4 * lane.own_row();
        __half uppers[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int products[2];
          lane.multiply(coarse.words[i], products);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float upper = codes[j].coarse_bound(products[j], byte_of(coarse.scales, i), byte_of(coarse.norms, i));
            if (op.scoring.alibi_slopes) upper += sketch::bias_bound(slopes[j], own + i - last);
            uppers[j][i] = __float2half_ru(upper);
            if (own + i < end && upper > bests[j].upper) bests[j] = {upper, own + i};
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (lane.head(j) < heads.count && own < end) {
            auto* to = scratch.uppers + (first_head + lane.head(j)) * scratch.capacity + own;
            *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(uppers[j]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int distance = 2; distance < 32; distance *= 2) bests[j].take(shuffle_xor(bests[j], distance));
        if (threadIdx.x % 32 < 2 && lane.head(j) < heads.count) {
          scratch.bests[(first_head + lane.head(j)) * kMostChunks + nth] = bests[j].token;
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) find_floors(SelectSketch op, Scratch scratch, bool vectors) {
  take_turn();
  constexpr int kLanes = 8, kCount = 16 / sizeof(T);  // of a key
  __shared__ float s_q[kMaxHeadDim];
  __shared__ const T* s_keys[kMostChunks];
  __shared__ float s_scores[kMostChunks];
  __shared__ int32_t s_tokens[kMostChunks];
  const int64_t row = blockIdx.y, at = row * op.q_heads + blockIdx.x;
  const int head = blockIdx.x, kv_head = head / op.group, thread = threadIdx.x;
  const int seq_len = length_of(op, row), chunks = ceil_div(seq_len, chunk_of(seq_len));
  const int page_bits = __ffs(op.page_size) - 1;
  const Entmax<double> entmax(op.alpha.of(head));
  if (entmax.is_softmax() || seq_len == 0) {
    if (thread == 0) scratch.floors[at] = kNothing;
    return;
  }
#pragma unroll
  for (int i = 0; i < kMostChunks / kThreads; ++i) {
    const int nth = i * kThreads + thread;
    if (nth >= chunks) break;
    const int token = scratch.bests[at * kMostChunks + nth];
    s_tokens[nth] = token;
    s_keys[nth] =
        token < 0 ? nullptr
                  : op.k_pages.at<T>(op.page_table.row(row)[token >> page_bits], kv_head, token & (op.page_size - 1));
  }
  float own_square = 0;
  for (int d = thread; d < kMaxHeadDim; d += kThreads) {
    s_q[d] = d < op.head_dim ? op.scoring.scale * to_float(op.q.at<T>(row, head)[d]) : 0;
    own_square += s_q[d] * s_q[d];
  }
  const float q_norm = sqrtf(sum<kThreads>(own_square));  // the barrier in it: keys and q are there
  const float slope = op.scoring.slope(head);
  float best = kNothing, most_square = 0;
#pragma unroll 2
  for (int first = thread / kLanes; first < kMostChunks; first += kThreads / kLanes) {
    const bool there = first < chunks && s_keys[first];
    float product = 0, square = 0;
    if (there) {
      for (int d = thread % kLanes * kCount; d < op.head_dim; d += kLanes * kCount) {
        float elements[kCount];
        unpack<T>(
            vectors ? load_word<true>(s_keys[first], d, op.head_dim) : load_word<false>(s_keys[first], d, op.head_dim),
            elements);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          product = fmaf(elements[e], s_q[d + e], product);
          square = fmaf(elements[e], elements[e], square);
        }
      }
    }
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      product += __shfl_xor_sync(kAllLanes, product, distance);
      square += __shfl_xor_sync(kAllLanes, square, distance);
    }
    if (there) product += slope * static_cast<float>(s_tokens[first] - (seq_len - 1));
    if (thread % kLanes == 0 && first < chunks) s_scores[first] = there ? product : kNothing;
    if (there) {
      best = larger(best, product);
      most_square = larger(most_square, square);
    }
  }
  best = largest<kThreads>(best);
  most_square = largest<kThreads>(most_square);
  float floor = kNothing;
  if (best > kNothing && best < -kNothing) {
    const float origin = best - static_cast<float>(entmax.beta) * (1 + 0x1p-20f);
    const int near = pack(s_scores, s_tokens, chunks,
                          [&](int i) { return Entry{s_scores[i] > origin ? s_scores[i] : kNothing, 0}; });
    Team team = Team::block();
    const Weights weights = find_weights(team, entmax, {s_scores, near, origin}, near <= kFewTokens);
    const double found = origin + weights.threshold * entmax.beta;
    const double rounding =
        0x1p-15 * q_norm * sqrtf(most_square) +
        0x1p-20 * (fabs(found) + fabsf(best) + entmax.beta + fabsf(slope) * static_cast<float>(seq_len));
    floor = nextafterf(static_cast<float>(found - rounding), kNothing);
    if (floor != floor) floor = kNothing;
  }
  if (thread == 0) scratch.floors[at] = floor;
}

/// How far above the floor a token may be, in steps of z; above 1 no weight is.
__device__ int merit_of(const Entmax<double>& entmax, float upper, float floor) {
  const float above = static_cast<float>(entmax.gap) * (upper - floor) * (kBins - 1);
  return above < kBins - 2 ? max(static_cast<int>(above), 0) : kBins - 2;  // NaN too
}

/// The marks of a warp's segment.
struct Segment {
  static constexpr int kWords = kSegment / 32;
  uint32_t marks[kWords];
  uint32_t survivors[kWords];
  uint8_t merits[kSegment];
  uint16_t queue[kSegment + kTokens];
};

template <int kWords>
__global__ void __launch_bounds__(kScanThreads, kOccupancy<kWords>) refine(SelectSketch op, Scratch scratch) {
  take_turn();
  __shared__ Numbers s_numbers;
  __shared__ Segment s_segments[kScanWarps];
  __shared__ float s_floors[kHeads];
  Segment& s = s_segments[threadIdx.x / 32];
  const int lane_id = threadIdx.x % 32;
  const auto segments_of = [&](int list) { return ceil_div(length_of(op, list / op.kv_heads), kSegment); };
  const auto units_of = [&](int list) { return ceil_div(segments_of(list), kScanWarps); };
  const auto share = Share::of_block<kScanThreads>(op.batch * op.kv_heads, units_of);
  int unit = share.item, left = share.items;
#pragma unroll 1
  for (int list = share.list; left > 0; ++list, unit = 0) {
    const int of_list = min(units_of(list) - unit, left);
    if (of_list <= 0) continue;
    left -= of_list;
    const int64_t row = list / op.kv_heads;
    const int kv_head = list % op.kv_heads, parts = Heads::parts(op);
    const int seq_len = length_of(op, row), last = seq_len - 1;
    const Pages pages(op, row, kv_head);
#pragma unroll 1
    for (int end = unit + of_list; unit < end; ++unit) {
      const int segment = unit * kScanWarps + static_cast<int>(threadIdx.x / 32);
      const int begin = segment * kSegment, tokens = min(kSegment, seq_len - begin);
      if (lane_id < Segment::kWords) s.marks[lane_id] = 0;
      if (scratch.merits) {
        for (int i = lane_id; i < kSegment; i += 32) s.merits[i] = 0;
      }
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        const Heads heads(op, row, kv_head, part);
        if (parts > 1 || unit == end - of_list) {
          s_numbers.set(op, heads);
          if (threadIdx.x < kHeads) {
            s_floors[threadIdx.x] = static_cast<int>(threadIdx.x) < heads.count
                                        ? scratch.floors[row * op.q_heads + heads.first + static_cast<int>(threadIdx.x)]
                                        : -kNothing;
          }
          __syncthreads();
        }
        // Eight tokens of a lane at once.
        int count = 0;
#pragma unroll
        for (int run = 0; run < kSegment / 256; ++run) {
          const int token = run * 256 + lane_id * 8;
          uint32_t mask = 0;
          if (token < tokens) {
            for (int h = 0; h < heads.count; ++h) {
              const auto word = *reinterpret_cast<const uint4*>(
                  scratch.uppers + (row * op.q_heads + heads.first + h) * scratch.capacity + begin + token);
              const auto* uppers = reinterpret_cast<const __half*>(&word);
              const float floor = s_floors[h];
#pragma unroll
              for (int i = 0; i < 8; ++i) mask |= static_cast<uint32_t>(!(__half2float(uppers[i]) <= floor)) << i;
            }
            mask &= (1u << min(8, tokens - token)) - 1;
          }
          const int upto = sum_upto(__popc(mask));
          int to = count + upto - __popc(mask);
          for (uint32_t rest = mask; rest; rest &= rest - 1) {
            s.queue[to++] = static_cast<uint16_t>(token + __ffs(static_cast<int>(rest)) - 1);
          }
          count += __shfl_sync(kAllLanes, upto, 31);
        }
        __syncwarp();
        const Lane<kWords> lane(s_numbers);
        const sketch::QueryCode codes[2] = {s_numbers.codes[lane.head(0)], s_numbers.codes[lane.head(1)]};
#pragma unroll 1
        for (int first = 0; first < count; first += kTokens) {
#pragma unroll 1
          for (int i = 0; i < 4; ++i) {
            // The entry of row r of matrix i is 16 i + r: the lane's tokens of its two rows, and its own.
            int its[2];
            int64_t page_heads[2];
            uint32_t words[2][kWords];
            int high[2], products[2] = {};
#pragma unroll
            for (int w = 0; w < 2; ++w) {
              its[w] = begin + s.queue[min(first + 16 * i + lane.row(w), count - 1)];
              page_heads[w] = pages.page_head(its[w]);
              load_words<kWords>(words[w], pages.codes(page_heads[w], its[w], 0) + 4 * kWords * lane.part());
            }
            lane.multiply(words, high);
            if (op.fine) {
#pragma unroll
              for (int w = 0; w < 2; ++w) {
                load_words<kWords>(words[w], pages.codes(page_heads[w], its[w], 1) + 4 * kWords * lane.part());
              }
              lane.multiply(words, products);
            }
            const int own = lane.part() < 2 ? its[0] : its[1];
            const int64_t page_head = lane.part() < 2 ? page_heads[0] : page_heads[1];
            const int scale = *pages.norms(page_head, own, 0), norm = *pages.norms(page_head, own, op.fine ? 2 : 1);
            int merit = -1;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int h = lane.head(j);
              if (h >= heads.count) continue;
              float upper = op.fine ? codes[j].fine_bound(4 * high[j] + products[j], scale, norm)
                                    : codes[j].coarse_bound(high[j], scale, norm);
              if (op.scoring.alibi_slopes) {
                upper += sketch::bias_bound(op.scoring.slope(heads.first + h), own - last);
              }
              if (upper <= s_floors[h]) continue;
              merit = scratch.merits
                          ? max(merit, merit_of(Entmax<double>(op.alpha.of(heads.first + h)), upper, s_floors[h]))
                          : 0;
            }
            merit = max(merit, __shfl_xor_sync(kAllLanes, merit, 1));
            if (merit >= 0 && lane.part() % 2 == 0 && first + 16 * i + lane.own_row() < count) {
              const int token = own - begin;
              atomicOr(&s.marks[token / 32], 1u << token % 32);
              if (scratch.merits) s.merits[token] = static_cast<uint8_t>(max(merit, int{s.merits[token]}));
            }
          }
        }
        __syncwarp();
      }
      if (tokens <= 0) continue;
      const int64_t word = (int64_t{list} * scratch.capacity + begin) / 32 + lane_id;
      const uint32_t mask = lane_id < Segment::kWords ? s.marks[lane_id] : 0;
      if (lane_id < Segment::kWords) scratch.marks[word] = mask;
      const int marked = __reduce_add_sync(kAllLanes, __popc(mask));
      if (lane_id == 0) scratch.marked[int64_t{list} * scratch.segments() + segment] = marked;
      if (scratch.merits) {
#pragma unroll 1
        for (int i = lane_id; i < tokens; i += 32) {
          scratch.merits[int64_t{list} * scratch.capacity + begin + i] = s.merits[i];
          if (s.marks[i / 32] >> i % 32 & 1) atomicAdd(scratch.at_merit + int64_t{list} * kBins + s.merits[i], 1);
        }
      }
      __syncwarp();  // before the next segment
    }
  }
}

/// Of more marked tokens than there is room for, leaves those of the best whole steps of merit, and says how much
/// weight the others can have. Grid (any, KV head, row).
__global__ void __launch_bounds__(kThreads) cap(SelectSketch op, Scratch scratch) {
  take_turn();
  static_assert(kBins == kThreads);
  const int64_t row = blockIdx.z, list = row * op.kv_heads + blockIdx.y;
  const int thread = threadIdx.x, lane = thread % 32, room = op.selection.max_selected;
  const int merit = kBins - 1 - thread, count = scratch.at_merit[list * kBins + merit];
  int total;
  const int upto = exclusive_scan<kThreads>(count, total) + count;  // of that merit or a better one
  // The best merit that some token has stays, if need be not of all.
  const bool stays = total <= room || (count > 0 && (upto <= room || upto == count));
  const auto least = static_cast<int>(-largest<kThreads>(stays ? static_cast<float>(-merit) : kNothing));
  if (blockIdx.x == 0) {
    const int left_out = merit < least ? count : merit == least ? max(0, upto - room) : 0;
#pragma unroll 1
    for (int h = 0; h < op.group; ++h) {
      const int head = static_cast<int>(blockIdx.y) * op.group + h;
      const Entmax<double> entmax(op.alpha.of(head));
      const double most = entmax.is_softmax() ? 1 : power(double(merit + 1) / (kBins - 1), entmax.beta);
      const double bound = sum<kThreads>(left_out > 0 ? left_out * most : 0.0);
      if (thread == 0) op.delta_bound[row * op.q_heads + head] = static_cast<float>(fmin(bound * (1 + 0x1p-20), 1.0));
    }
  }
  if (total <= room) return;
  const int seq_len = length_of(op, row), warps = kThreads / 32;
#pragma unroll 1
  for (int segment = static_cast<int>(blockIdx.x) * warps + thread / 32; segment * kSegment < seq_len;
       segment += static_cast<int>(gridDim.x) * warps) {
    uint32_t* marks = scratch.marks + (list * scratch.capacity + segment * kSegment) / 32;
    const uint8_t* merits = scratch.merits + list * scratch.capacity + segment * kSegment;
    int marked = 0;
#pragma unroll 1
    for (int word = 0; word < Segment::kWords; ++word) {
      const bool stays_marked = marks[word] >> lane & 1 && merits[word * 32 + lane] >= least;
      const uint32_t mask = __ballot_sync(kAllLanes, stays_marked);
      if (lane == 0) marks[word] = mask;
      marked += __popc(mask);
    }
    if (lane == 0) scratch.marked[list * scratch.segments() + segment] = marked;
  }
}

/// Grid (kListSegments segments, KV head, row).
__global__ void __launch_bounds__(kThreads) list_marked(SelectSketch op, Scratch scratch) {
  take_turn();
  __shared__ int s_marked[kListSegments];
  const int64_t row = blockIdx.z, list = row * op.kv_heads + blockIdx.y;
  const int thread = threadIdx.x, lane = thread % 32, room = op.selection.max_selected;
  const int first = static_cast<int>(blockIdx.x) * kListSegments, segments = ceil_div(length_of(op, row), kSegment);
  if (blockIdx.x == 0 && !scratch.merits && thread < op.group) {
    op.delta_bound[row * op.q_heads + static_cast<int>(blockIdx.y) * op.group + thread] = 0;
  }
  if (first >= max(segments, 1)) return;
  const int32_t* marked = scratch.marked + list * scratch.segments();
  int own = 0;
#pragma unroll 4
  for (int i = thread; i < first; i += kThreads) own += marked[i];
  if (thread < kListSegments) s_marked[thread] = first + thread < segments ? marked[first + thread] : 0;
  int before = sum<kThreads>(own);  // the barrier in it: s_marked is there
  int32_t* selected = op.selection.row(list);
#pragma unroll 1
  for (int nth = 0; nth < kListSegments; ++nth) {
    const int segment = first + nth;
    if (nth % (kThreads / 32) == thread / 32 && segment < segments) {
      const int64_t word = (list * scratch.capacity + segment * kSegment) / 32 + lane;
      const uint32_t mask = lane < Segment::kWords ? scratch.marks[word] : 0;
      int to = before + sum_upto(__popc(mask)) - __popc(mask);
      for (uint32_t rest = mask; rest && to < room; rest &= rest - 1, ++to) {
        selected[to] = segment * kSegment + lane * 32 + __ffs(static_cast<int>(rest)) - 1;
      }
    }
    before += s_marked[nth];
  }
  if (thread == 0 && first + kListSegments >= segments) op.selection.counts[list] = min(before, room);
}

template <typename Body>
void dispatch_words(int head_dim, Body body) {
  switch (sketch::dims_of(head_dim) / sketch::kBlock) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, 4>{});
  }
}

}  // namespace

int64_t workspace_bytes(const SelectSketch& op) { return Scratch(op).place(op, nullptr); }

void select_sketch(const SelectSketch& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  const char* name = "select_sketch";
  Scratch scratch(op);
  scratch.place(op, workspace);
  const bool vectors = in_vectors(op.k_pages, op.dtype, op.head_dim);
  if (scratch.merits) {
    check(name, cudaMemsetAsync(scratch.at_merit, 0, int64_t{op.batch} * op.kv_heads * kBins * 4, stream));
  }
  dispatch_words(op.head_dim, [&](auto words) {
    const Grid grid{dim3(kOccupancy<words> * multiprocessors()), kScanThreads};
    launch(name, scan<words>, grid, stream, op, scratch);
    dispatch_element(op.dtype, [&](auto element) {
      launch(name, find_floors<decltype(element)>, {dim3(op.q_heads, op.batch), kThreads}, stream, op, scratch,
             vectors);
    });
    launch(name, refine<words>, grid, stream, op, scratch);
  });
  const dim3 segments(std::max(1, ceil_div(scratch.segments(), kListSegments)), op.kv_heads, op.batch);
  if (scratch.merits) launch(name, cap, {segments, kThreads}, stream, op, scratch);
  launch(name, list_marked, {segments, kThreads}, stream, op, scratch);
}

}  // namespace entmaxkv::cuda
