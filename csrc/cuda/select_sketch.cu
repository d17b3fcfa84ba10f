// select_sketch on the GPU.
//   q, sketch [pages, kv_heads, ...] -> selected tokens [batch, kv_heads, max_selected] ascending, counts
//   1. scan: a warp bounds the scores of a chunk of tokens by plane 0 of their codes, for up to 4 query heads. It keeps
//      the bounds in fp16, rounded up, and names the tokens with the highest ones: one of each class of four successive
//      tokens in 32, so that neighbours, which often have weight together, are named together.
//   2. find_floors: a block per query head scores the best of these exactly; their threshold is at most that of all.
//   3. refine: a warp goes through a segment of the bounds. What is above the floor of its head is bounded more closely
//      by plane 1; what still is gets a bit.
//   4. list: the tokens of these bits.
//   If no more than max_tokens may be listed, cap comes before that: the bits of whole steps of merit go.
#include "kernels.h"
#include "share.cuh"
#include "sketch_tile.cuh"
#include "tile.cuh"
#include "weights.cuh"

namespace entmaxkv::cuda {

namespace {

using namespace sketch_tile;

template <int kWords>
constexpr int kBlocks = kWords <= 2 ? 4 : 6 - kWords;  // that share a multiprocessor

/// How many of them registers must suffice for: older compilations need a few more.
template <int kWords>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kOccupancy = kBlocks<kWords> - 1;
#else
constexpr int kOccupancy = kBlocks<kWords>;
#endif
constexpr int kMostChunks = 512;
constexpr int kClasses = 8;
constexpr int kSegment = 256;  // tokens
constexpr int kBins = 256;     // sketch::kMerits, and one more

/// Tokens of a chunk of a row.
__host__ __device__ int chunk_of(int seq_len) {
  return max(1, ceil_div(ceil_div(seq_len, kTokens), kMostChunks)) * kTokens;
}

/// The token of the highest bound so far.
struct Best {
  float upper = kNothing;
  int token = -1;

  __device__ void take(const Best& other) {
    if (other.upper > upper || (other.upper == upper && other.token >= 0 && other.token < token)) *this = other;
  }
};

/// Intermediate results. Every length has room for whole segments.
struct Scratch {
  int capacity;       // tokens
  __half* uppers;     // [batch, q_heads, capacity]
  Best* bests;        // [batch, q_heads, kClasses, chunks]
  float* floors;      // [batch, q_heads]
  uint32_t* marks;    // [batch, kv_heads, capacity / 32]
  int32_t* marked;    // [batch, kv_heads, segments]
  uint8_t* merits;    // [batch, kv_heads, capacity], if capped
  int32_t* at_merit;  // [batch, kv_heads, kBins], if capped

  explicit Scratch(const SelectSketch& op) : capacity(ceil_div(op.max_pages * op.page_size, kSegment) * kSegment) {}

  __host__ __device__ int segments() const { return capacity / kSegment; }
  __host__ __device__ int chunks() const { return min(capacity / kTokens, kMostChunks); }

  /// Of the chunks of a row and query head, in a class.
  __device__ Best* bests_of(int64_t row_head, int its_class) const {
    return bests + (row_head * kClasses + its_class) * chunks();
  }

  /// Places all of it from `memory` on; returns how many bytes that are.
  int64_t place(const SelectSketch& op, void* memory) {
    auto* next = static_cast<char*>(memory);
    const auto take = [&](auto*& to, int64_t count) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(next);
      next += (count * static_cast<int64_t>(sizeof(*to)) + 255) / 256 * 256;
    };
    const int64_t heads = int64_t{op.batch} * op.q_heads, lists = int64_t{op.batch} * op.kv_heads;
    take(uppers, heads * capacity);
    take(bests, heads * kClasses * chunks());
    take(floors, heads);
    take(marks, lists * capacity / 32);
    take(marked, lists * segments());
    at_merit = nullptr;
    merits = nullptr;
    if (op.selection.max_selected < op.max_pages * op.page_size) {
      take(at_merit, lists * kBins);
      take(merits, lists * capacity);
    }
    return next - static_cast<char*>(memory);
  }
};

template <int kWords>
__global__ void __launch_bounds__(kScanThreads, kOccupancy<kWords>) scan(SelectSketch op, Scratch scratch) {
  take_turn();
  __shared__ Numbers s_numbers;
  const int parts = CodeHeads::parts(op), lists = op.batch * op.kv_heads * parts;
  const auto chunks_of = [&](int list) {
    const int seq_len = length_of(op, list / (op.kv_heads * parts));
    return ceil_div(seq_len, chunk_of(seq_len));
  };
  const auto units_of = [&](int list) { return ceil_div(chunks_of(list), kScanWarps); };
  Share::of_block<kScanThreads>(lists, units_of).visit(units_of, [&](int list, int unit, int of_list) {
    const CodeHeads heads(op, list / (op.kv_heads * parts), list / parts % op.kv_heads, list % parts);
    s_numbers.set(op, heads);
    const Lane<kWords> lane(s_numbers);
    const SketchPages pages(op, heads.row, heads.kv_head);
    const int seq_len = length_of(op, heads.row), chunk = chunk_of(seq_len), last = seq_len - 1;
    const int64_t first_head = heads.row * op.q_heads + heads.first;
    const sketch::QueryCode codes[2] = {s_numbers.codes[lane.head(0)], s_numbers.codes[lane.head(1)]};
    float slopes[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) slopes[j] = heads.slope(op, lane.head(j));
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
        bests[j].take(shuffle_xor(bests[j], 2));  // rows that are 8 apart
        if (lane.part() < 2 && lane.head(j) < heads.count) {
          scratch.bests_of(first_head + lane.head(j), lane.row(0))[nth] = bests[j];
        }
      }
    }
  });
}

/// Of the tokens that the scan has named, those of the highest bounds of each class, -1 where there are no more. All
/// threads call.
__device__ void choose_exact(const Scratch& scratch, int64_t row_head, int chunks, int (&s_tokens)[sketch::kExact]) {
  constexpr int kOfClass = sketch::kExact / kClasses, kOwn = kMostChunks / 32;
  static_assert(kClasses == kThreads / 32);
  const int lane = threadIdx.x % 32, its_class = threadIdx.x / 32;
  const Best* bests = scratch.bests_of(row_head, its_class);
  Best own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (i * 32 + lane < chunks) own[i] = bests[i * 32 + lane];
  }
#pragma unroll 1
  for (int n = 0; n < kOfClass; ++n) {
    Best best;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) best.take(own[i]);
    const uint32_t highest = __reduce_max_sync(kAllLanes, best.token < 0 ? 0 : ordered(best.upper));
    const uint32_t have = __ballot_sync(kAllLanes, best.token >= 0 && ordered(best.upper) == highest);
    const int chosen = have ? __shfl_sync(kAllLanes, best.token, __ffs(static_cast<int>(have)) - 1) : -1;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (own[i].token == chosen) own[i] = {};
    }
    if (lane == 0) s_tokens[its_class * kOfClass + n] = chosen;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) find_floors(SelectSketch op, Scratch scratch, bool vectors) {
  take_turn();
  constexpr int kLanes = 8, kCount = 16 / sizeof(T);        // of a key
  constexpr int kOwn = sketch::kExact * kLanes / kThreads;  // keys of a lane
  __shared__ float s_q[kMaxHeadDim];
  __shared__ int s_tokens[sketch::kExact];
  __shared__ float s_scores[sketch::kExact];
  __shared__ int32_t s_places[sketch::kExact];
  const int64_t row = blockIdx.y, at = row * op.q_heads + blockIdx.x;
  const int head = blockIdx.x, kv_head = head / op.group, thread = threadIdx.x;
  const int seq_len = length_of(op, row);
  const Entmax<double> entmax(op.alpha.of(head));
  if (entmax.is_softmax() || seq_len == 0) {
    if (thread == 0) scratch.floors[at] = kNothing;
    return;
  }
  float own_square = 0;
  for (int d = thread; d < kMaxHeadDim; d += kThreads) {
    s_q[d] = d < op.head_dim ? op.scoring.scale * to_float(op.q.at<T>(row, head)[d]) : 0;
    own_square += s_q[d] * s_q[d];
  }
  choose_exact(scratch, at, ceil_div(seq_len, chunk_of(seq_len)), s_tokens);
  const float q_norm = sqrtf(sum<kThreads>(own_square));  // the barrier in it: query and tokens are there
  const float slope = op.scoring.slope(head);
  const T* keys[kOwn];
  int tokens[kOwn];
  float products[kOwn] = {}, squares[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int page_bits = __ffs(op.page_size) - 1;
    const int token = tokens[i] = s_tokens[i * (kThreads / kLanes) + thread / kLanes];
    keys[i] = op.k_pages.at<T>(op.page_table.row(row)[max(token, 0) >> page_bits], kv_head,
                               max(token, 0) & (op.page_size - 1));
  }
#pragma unroll 2
  for (int d = thread % kLanes * kCount; d < op.head_dim; d += kLanes * kCount) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float elements[kCount];
      unpack<T>(vectors ? load_word<true>(keys[i], d, op.head_dim) : load_word<false>(keys[i], d, op.head_dim),
                elements);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        products[i] = fmaf(elements[e], s_q[d + e], products[i]);
        squares[i] = fmaf(elements[e], elements[e], squares[i]);
      }
    }
  }
  float scores[kOwn], best = kNothing;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      products[i] += __shfl_xor_sync(kAllLanes, products[i], distance);
      squares[i] += __shfl_xor_sync(kAllLanes, squares[i], distance);
    }
    scores[i] = tokens[i] < 0 ? kNothing : products[i] + slope * static_cast<float>(tokens[i] - (seq_len - 1));
    best = larger(best, scores[i]);
  }
  best = largest<kThreads>(best);
  float floor = kNothing;
  if (best > kNothing && best < -kNothing) {
    const float origin = best - static_cast<float>(entmax.beta) * (1 + 0x1p-20f);
    float most_square = 0;  // of those that the threshold depends on
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (scores[i] > origin) most_square = fmaxf(most_square, squares[i]);
      if (thread % kLanes == 0) s_scores[i * (kThreads / kLanes) + thread / kLanes] = scores[i];
    }
    most_square = largest<kThreads>(most_square);  // the barrier in it: all scores are there
    const int near = pack(s_scores, s_places, sketch::kExact,
                          [&](int i) { return Entry{s_scores[i] > origin ? s_scores[i] : kNothing, 0}; });
    Team team = Team::block();
    const Weights weights = find_weights(team, entmax, {s_scores, near, origin}, true);
    const double found = weights.origin + weights.threshold * entmax.beta;
    const double rounding =
        0x1p-15 * q_norm * sqrtf(most_square) +
        0x1p-18 * (fabs(found) + fabsf(best) + entmax.beta + fabsf(slope) * static_cast<float>(seq_len));
    floor = nextafterf(static_cast<float>(found - rounding), kNothing);
    if (floor != floor) floor = kNothing;
  }
  if (thread == 0) scratch.floors[at] = floor;
}

/// A warp's tile of tokens to be bounded by both planes: those that some head still wants.
template <int kWords>
struct Fine {
  uint32_t words[4][2][kWords];
  uint32_t scales, coarse, fine;
  uint2 uppers[2];  // of this lane's four tokens, for its two heads
  uint32_t wanted;  // of the four, a bit each

  /// The bounds that the scan has left, of kTokens tokens from `first` on.
  static __device__ void load(uint2 (&to)[2], const __half* uppers, int64_t stride, int heads, int first) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int h = min(Lane<kWords>::head(j), heads - 1);
      to[j] = __ldg(reinterpret_cast<const uint2*>(uppers + h * stride + first + 4 * Lane<kWords>::own_row()));
    }
  }

  static __device__ float upper_of(const uint2& word, int nth) {
    return __half2float(reinterpret_cast<const __half*>(&word)[nth]);
  }

  /// Begins to load what is wanted of the tile; returns whether that is anything. All lanes call.
  __device__ bool load(const SketchPages& pages, const uint2 (&its_uppers)[2], const float (&floors)[2], int first,
                       int end, bool both_planes) {
    const int own = first + 4 * Lane<kWords>::own_row();
    wanted = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uppers[j] = its_uppers[j];
#pragma unroll
      for (int i = 0; i < 4; ++i) wanted |= static_cast<uint32_t>(!(upper_of(uppers[j], i) <= floors[j])) << i;
    }
    wanted &= own < end ? (1u << min(4, end - own)) - 1 : 0;
    wanted |= __shfl_xor_sync(kAllLanes, wanted, 1);
    const uint32_t other = __shfl_xor_sync(kAllLanes, wanted, 2);
    if (__ballot_sync(kAllLanes, wanted != 0) == 0) return false;
    if (!both_planes) return true;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t of_row = (Lane<kWords>::part() / 2 == w) ? wanted : other;
      const int token = first + 4 * Lane<kWords>::row(w);
      const int64_t page_head = of_row ? pages.page_head(token) : 0;
      const uint8_t* codes = pages.codes(page_head, token, 1) + 4 * kWords * Lane<kWords>::part();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (of_row >> i & 1) load_words<kWords>(words[i][w], codes + i * pages.row_bytes);
      }
      if (Lane<kWords>::part() / 2 == w && of_row) {
        scales = __ldg(reinterpret_cast<const uint32_t*>(pages.norms(page_head, token, 0)));
        coarse = __ldg(reinterpret_cast<const uint32_t*>(pages.norms(page_head, token, 1)));
        fine = __ldg(reinterpret_cast<const uint32_t*>(pages.norms(page_head, token, 2)));
      }
    }
    return true;
  }
};

/// A warp's segment.
struct Segment {
  static constexpr int kWords = kSegment / 32;
  uint32_t marks[kWords];
  uint8_t merits[kSegment];
};

/// Marks the tokens of a warp's segment of which the closest bound is above the floor of some of the heads. All lanes
/// call.
template <int kWords>
__device__ void mark(const SelectSketch& op, const Scratch& scratch, const SketchPages& pages, const CodeHeads& heads,
                     const Numbers& s_numbers, const float* s_floors, Segment& s, int begin, int tokens, int last) {
  const Lane<kWords> lane(s_numbers);
  const int end = begin + tokens;
  const int64_t first_head = heads.row * op.q_heads + heads.first;
  const __half* all_uppers = scratch.uppers + first_head * scratch.capacity;
  float floors[2], slopes[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    floors[j] = lane.head(j) < heads.count ? s_floors[lane.head(j)] : -kNothing;
    slopes[j] = heads.slope(op, lane.head(j));
  }
  uint2 uppers[2];
  Fine<kWords>::load(uppers, all_uppers, scratch.capacity, heads.count, begin);
  Fine<kWords> next;
  bool there = next.load(pages, uppers, floors, begin, end, op.fine);
  if (begin + kTokens < end) {
    Fine<kWords>::load(uppers, all_uppers, scratch.capacity, heads.count, begin + kTokens);
  }
#pragma unroll 1
  for (int first = begin; first < end; first += kTokens) {
    const Fine<kWords> tile = next;
    const bool wanted = there;
    if (first + kTokens < end) {
      there = next.load(pages, uppers, floors, first + kTokens, end, op.fine);
      if (first + 2 * kTokens < end) {
        Fine<kWords>::load(uppers, all_uppers, scratch.capacity, heads.count, first + 2 * kTokens);
      }
    }
    if (!wanted) continue;
    uint32_t marks = 0;
    int merits[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int products[2];
      if (op.fine) lane.multiply(tile.words[i], products);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float upper = tile.upper_of(tile.uppers[j], i);
        if (op.fine) {
          const int distance = first + 4 * lane.own_row() + i - last;
          const float bias = op.scoring.alibi_slopes ? sketch::bias_bound(slopes[j], distance) : 0;
          const float closer = s_numbers.codes[lane.head(j)].refined(upper - bias, products[j], byte_of(tile.scales, i),
                                                                     byte_of(tile.coarse, i), byte_of(tile.fine, i));
          upper = fminf(upper, closer + bias);
        }
        if ((tile.wanted >> i & 1) == 0 || upper <= floors[j] || lane.head(j) >= heads.count) continue;
        marks |= 1u << i;
        if (scratch.merits) {
          const auto gap = static_cast<float>(Entmax<double>(op.alpha.of(heads.first + lane.head(j))).gap);
          merits[i] = max(merits[i], sketch::merit_of(gap * (upper - floors[j])));
        }
      }
    }
    marks |= __shfl_xor_sync(kAllLanes, marks, 1);
    const int row = lane.own_row() % 8;
    const bool speaks = lane.part() % 2 == 0;
    if (scratch.merits) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        merits[i] = max(merits[i], __shfl_xor_sync(kAllLanes, merits[i], 1));
        uint8_t& merit = s.merits[first - begin + 4 * lane.own_row() + i];
        if (speaks && marks >> i & 1) merit = static_cast<uint8_t>(max(merits[i], int{merit}));
      }
    }
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const bool own = speaks && lane.part() / 2 == w;
      const uint32_t word = __reduce_or_sync(kAllLanes, own ? marks << 4 * row : 0);
      if (threadIdx.x % 32 == 0) s.marks[(first - begin) / 32 + w] |= word;
    }
  }
  __syncwarp();
}

template <int kWords>
__global__ void __launch_bounds__(kScanThreads, kOccupancy<kWords>) refine(SelectSketch op, Scratch scratch) {
  take_turn();
  __shared__ Numbers s_numbers;
  __shared__ Segment s_segments[kScanWarps];
  __shared__ float s_floors[kHeads];
  Segment& s = s_segments[threadIdx.x / 32];
  const int thread = threadIdx.x, lane = thread % 32, parts = CodeHeads::parts(op);
  const auto segments_of = [&](int list) { return ceil_div(length_of(op, list / op.kv_heads), kSegment); };
  const auto units_of = [&](int list) { return ceil_div(segments_of(list), kScanWarps); };
  Share::of_block<kScanThreads>(op.batch * op.kv_heads, units_of).visit(units_of, [&](int list, int unit, int of_list) {
    const int64_t row = list / op.kv_heads;
    const int kv_head = list % op.kv_heads, seq_len = length_of(op, row);
    const SketchPages pages(op, row, kv_head);
    bool fresh = true;
#pragma unroll 1
    for (const int end = unit + of_list; unit < end; ++unit) {
      const int segment = unit * kScanWarps + thread / 32;
      const int begin = segment * kSegment, tokens = min(kSegment, seq_len - begin);
      if (lane < Segment::kWords) s.marks[lane] = 0;
      if (scratch.merits) {
        for (int i = lane; i < kSegment; i += 32) s.merits[i] = 0;
      }
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        const CodeHeads heads(op, row, kv_head, part);
        if (parts > 1 || fresh) {
          s_numbers.set(op, heads);
          if (thread < heads.count) s_floors[thread] = scratch.floors[row * op.q_heads + heads.first + thread];
          __syncthreads();
          fresh = false;
        }
        __syncwarp();
        if (tokens > 0) mark<kWords>(op, scratch, pages, heads, s_numbers, s_floors, s, begin, tokens, seq_len - 1);
      }
      if (tokens <= 0) continue;
      const uint32_t mask = lane < Segment::kWords ? s.marks[lane] : 0;
      const int64_t at = int64_t{list} * scratch.capacity + begin;
      if (lane < Segment::kWords) scratch.marks[at / 32 + lane] = mask;
      const int marked = __reduce_add_sync(kAllLanes, __popc(mask));
      if (lane == 0) scratch.marked[int64_t{list} * scratch.segments() + segment] = marked;
      if (scratch.merits) {
#pragma unroll 1
        for (int i = lane; i < tokens; i += 32) {
          scratch.merits[at + i] = s.merits[i];
          if (s.marks[i / 32] >> i % 32 & 1) atomicAdd(scratch.at_merit + int64_t{list} * kBins + s.merits[i], 1);
        }
      }
      __syncwarp();  // before the next segment
    }
  });
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
      const double most = sketch::most_weight(merit, entmax);
      const double bound = sum<kThreads>(left_out > 0 ? left_out * most : 0.0);
      if (thread == 0) op.delta_bound[row * op.q_heads + head] = sketch::rounded_up(bound);
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

/// Lists the tokens of a block's words of marks, and pads what the list leaves of as many places. Grid (words of marks
/// / kThreads, KV head, row).
__global__ void __launch_bounds__(kThreads) list_marked(SelectSketch op, Scratch scratch) {
  take_turn();
  const int64_t row = blockIdx.z, list = row * op.kv_heads + blockIdx.y;
  const int thread = threadIdx.x, room = op.selection.max_selected;
  const int first_word = static_cast<int>(blockIdx.x) * kThreads, word = first_word + thread;
  const int segments = ceil_div(length_of(op, row), kSegment), words = segments * Segment::kWords;
  if (blockIdx.x == 0 && !scratch.merits && thread < op.group) {
    op.delta_bound[row * op.q_heads + static_cast<int>(blockIdx.y) * op.group + thread] = 0;
  }
  const int32_t* marked = scratch.marked + list * scratch.segments();
  int own_before = 0, own = 0;
#pragma unroll 4
  for (int i = thread; i < segments; i += kThreads) {
    own += marked[i];
    if (i < first_word / Segment::kWords) own_before += marked[i];
  }
  const int before = sum<kThreads>(own_before), count = min(sum<kThreads>(own), room);
  uint32_t mask = word < words ? scratch.marks[list * (scratch.capacity / 32) + word] : 0;
  int total;
  int to = before + exclusive_scan<kThreads>(__popc(mask), total);
  int32_t* selected = op.selection.row(list);
  for (; mask && to < room; mask &= mask - 1, ++to) selected[to] = word * 32 + __ffs(static_cast<int>(mask)) - 1;
  const int end = min((first_word + kThreads) * 32, room);
  for (int place = max(first_word * 32, count) + thread; place < end; place += kThreads) selected[place] = -1;
  if (blockIdx.x == 0 && thread == 0) op.selection.counts[list] = count;
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
  sketch::dispatch_blocks(op.head_dim, [&](auto words) {
    const Grid grid{dim3(kBlocks<words> * multiprocessors()), kScanThreads};
    launch(name, scan<words>, grid, stream, op, scratch);
    dispatch_element(op.dtype, [&](auto element) {
      launch(name, find_floors<decltype(element)>, {dim3(op.q_heads, op.batch), kThreads}, stream, op, scratch,
             vectors);
    });
    launch(name, refine<words>, grid, stream, op, scratch);
  });
  const dim3 words(std::max(1, ceil_div(scratch.capacity / 32, kThreads)), op.kv_heads, op.batch);
  if (scratch.merits) launch(name, cap, {words, kThreads}, stream, op, scratch);
  launch(name, list_marked, {words, kThreads}, stream, op, scratch);
}

}  // namespace entmaxkv::cuda
