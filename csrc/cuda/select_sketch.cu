// select_sketch on the GPU.
//   q, sketch [pages, kv_heads, ...] -> selected tokens [batch, kv_heads, max_selected] ascending, counts
//   1. scan: a warp bounds the scores of a chunk of tokens by plane 0 of their codes, for up to 4 query heads. It keeps
//      the bounds in fp16, rounded up, and names the tokens with the highest ones: one of each class of four successive
//      tokens in 32, so that neighbours, which often have weight together, are named together.
//   2. find_floors: a block per query head scores the best of these exactly; their threshold is at most that of all.
//      Where alpha = 1 and there is not room for all, their logsumexp takes its place.
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

/// How many of them registers must suffice for: compilations for other GPUs than Hopper need a few more.
template <int kWords>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
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
    const SketchPages<kWords> pages(op, heads.row, heads.kv_head);
    const int seq_len = length_of(op, heads.row), chunk = chunk_of(seq_len), last = seq_len - 1;
    const int64_t first_head = heads.row * op.q_heads + heads.first;
    const sketch::QueryCode codes[2] = {s_numbers.codes[lane.head(0)], s_numbers.codes[lane.head(1)]};
    const float slopes[2] = {sketch::upward(heads.slope(op, lane.head(0))),
                             sketch::upward(heads.slope(op, lane.head(1)))};
    const int chunks = min((unit + of_list) * kScanWarps, chunks_of(list));
    int nth = unit * kScanWarps + static_cast<int>(threadIdx.x / 32);
    Coarse<kWords> next;
    if (nth < chunks) next.load(pages, nth * chunk, last);
#pragma unroll 1
    for (; nth < chunks; nth += kScanWarps) {
      const int end = nth * chunk + min(chunk, seq_len - nth * chunk);
      Best bests[2];
#pragma unroll 1
      for (int first = nth * chunk; first < end; first += kTokens) {
        const Coarse<kWords> coarse = next;
        if (first + kTokens < end) {
          next.load(pages, first + kTokens, last);
        } else if (nth + kScanWarps < chunks) {
          next.load(pages, (nth + kScanWarps) * chunk, last);
        }
        const int own = first + 4 * lane.own_row();
        const auto distance = static_cast<float>(own - last);
        float bounds[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int products[2];
          lane.multiply(coarse.words[i], products);
          const float scale = byte_of(coarse.scales, i), step = sketch::step_of(scale);
          const float lost = sketch::distance_of(scale, byte_of(coarse.norms, i));
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            bounds[j][i] =
                codes[j].coarse_bound(products[j], step, lost) + slopes[j] * (distance + static_cast<float>(i));
          }
        }
        alignas(8) __half uppers[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uppers[j][i] = __float2half_ru(bounds[j][i]);
            if (own + i < end && bounds[j][i] > bests[j].upper) bests[j] = {bounds[j][i], own + i};
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
  const int64_t row = blockIdx.y, at = row * op.q_heads + blockIdx.x;
  const int head = blockIdx.x, kv_head = head / op.group, thread = threadIdx.x;
  const int seq_len = length_of(op, row);
  const Entmax<double> entmax(op.alpha.of(head));
  if (seq_len == 0 || (entmax.is_softmax() && seq_len <= op.selection.max_selected)) {
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
    const int page_bits = log2_of(op.page_size);
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
    const float depth = entmax.is_softmax() ? sketch::kBelow : static_cast<float>(entmax.beta);
    const float origin = entmax.is_softmax() ? kNothing : best - depth * (1 + 0x1p-20f);
    float most_square = 0;  // of those that the threshold depends on
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (scores[i] > origin) most_square = fmaxf(most_square, squares[i]);
      if (thread % kLanes == 0) s_scores[i * (kThreads / kLanes) + thread / kLanes] = scores[i];
    }
    most_square = largest<kThreads>(most_square);  // the barrier in it: all scores are there
    double found;
    if (entmax.is_softmax()) {
      found = best + logf(sum<kThreads>(thread < sketch::kExact ? expf(s_scores[thread] - best) : 0)) - depth;
    } else {
      const int near = pack(
          sketch::kExact, [&](int i) { return Entry{s_scores[i] > origin ? s_scores[i] : kNothing, 0}; },
          [&](int to, const Entry& entry) { s_scores[to] = entry.value; });
      Team team = Team::block();
      const Weights weights = find_weights(team, entmax, {s_scores, near, origin}, true);
      found = weights.origin + weights.threshold * entmax.beta;
    }
    const double rounding = 0x1p-15 * q_norm * sqrtf(most_square) +
                            0x1p-18 * (fabs(found) + fabsf(best) + depth + fabsf(slope) * static_cast<float>(seq_len));
    floor = nextafterf(static_cast<float>(found - rounding), kNothing);
    if (floor != floor) floor = kNothing;
  }
  if (thread == 0) scratch.floors[at] = floor;
}

/// What refining needs of a query head.
struct RefinedHead {
  float floor, slope;
  sketch::Worth worth;

  /// The h-th; where there is none, one that no bound is above the floor of.
  static __device__ RefinedHead of(const SelectSketch& op, const Scratch& scratch, const CodeHeads& heads, int h) {
    const int head = heads.first + min(h, heads.count - 1);
    return {h < heads.count ? scratch.floors[heads.row * op.q_heads + head] : -kNothing,
            sketch::upward(op.scoring.slope(head)), sketch::Worth(Entmax<double>(op.alpha.of(head)))};
  }
};

/// A warp's tile of tokens to be bounded by both planes: those that some head still wants.
template <int kWords>
struct Fine {
  uint32_t words[4][2][kWords];
  uint32_t scales, coarse, fine;
  uint2 uppers[2];  // of this lane's four tokens, for its two heads
  uint32_t wanted;  // of the four, a bit each

  /// The bounds that the scan has left, of kTokens tokens from `first` on.
  static __device__ void load_uppers(uint2 (&to)[2], const __half* uppers, int64_t stride, int heads, int first) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int h = min(Lane<kWords>::head(j), heads - 1);
      to[j] = __ldg(reinterpret_cast<const uint2*>(uppers + h * stride + first + 4 * Lane<kWords>::own_row()));
    }
  }

  static __device__ float upper_of(const uint2& word, int nth) {
    return __half2float(reinterpret_cast<const __half*>(&word)[nth]);
  }

  /// Begins to load what is wanted of the tile. All lanes call.
  template <bool kFine>
  __device__ void load(const SketchPages<kWords>& pages, const uint2 (&its_uppers)[2], const RefinedHead* heads,
                       int first, int end) {
    const int own = first + 4 * Lane<kWords>::own_row();
    wanted = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uppers[j] = its_uppers[j];
#pragma unroll
      for (int i = 0; i < 4; ++i) wanted |= static_cast<uint32_t>(!(upper_of(uppers[j], i) <= heads[j].floor)) << i;
    }
    wanted &= own < end ? (1u << min(4, end - own)) - 1 : 0;
    wanted |= __shfl_xor_sync(kAllLanes, wanted, 1);
    const uint32_t other = __shfl_xor_sync(kAllLanes, wanted, 2);
    if (!kFine || __ballot_sync(kAllLanes, wanted != 0) == 0) return;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t of_row = (Lane<kWords>::part() / 2 == w) ? wanted : other;
      const int token = first + 4 * Lane<kWords>::row(w);
      const uint32_t page = of_row ? pages.page(token) : 0;
      const uint8_t* codes = pages.codes_of(page, token, 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (of_row >> i & 1) load_words<kWords>(words[i][w], codes + i * pages.kRowBytes);
      }
      if (Lane<kWords>::part() / 2 == w && of_row) {
        scales = pages.norms_of(page, token, 0);
        coarse = pages.norms_of(page, token, 1);
        fine = pages.norms_of(page, token, 2);
      }
    }
  }
};

/// A warp's segment, of which nothing is marked at first.
struct Segment {
  static constexpr int kWords = kSegment / 32;
  uint32_t marks[kWords];
  uint8_t merits[kSegment];

  /// Joins what is marked for one part of a group's heads with earlier ones', counts with the last, and begins anew.
  __device__ void finish(const Scratch& scratch, int64_t list, int segment, bool first_part, bool last_part) {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    const int64_t at = list * scratch.capacity + segment * kSegment;
    uint32_t mask = 0;
    if (lane < kWords) {
      uint32_t& all = scratch.marks[at / 32 + lane];
      all = mask = first_part ? marks[lane] : marks[lane] | all;
      marks[lane] = 0;
    }
    if (last_part) {
      const int marked = __reduce_add_sync(kAllLanes, __popc(mask));
      if (lane == 0) scratch.marked[list * scratch.segments() + segment] = marked;
    }
    if (scratch.merits) {
#pragma unroll 1
      for (int word = 0; word < kWords; ++word) {
        uint8_t& all = scratch.merits[at + word * 32 + lane];
        uint8_t& its = merits[word * 32 + lane];
        all = first_part ? its : max(its, all);
        its = 0;
        if (last_part && __shfl_sync(kAllLanes, mask, word) >> lane & 1) {
          atomicAdd(scratch.at_merit + list * kBins + all, 1);
        }
      }
    }
    __syncwarp();
  }
};

/// Marks the tokens of which the closest bound is above the floor of some of the heads. All lanes call, with a segment
/// for the warp. It has tokens `begin` to `stop`: a segment, those of the block's other warps, a segment ...
template <int kWords, bool kFine, bool kCapped>
__device__ void mark(const SelectSketch& op, const Scratch& scratch, const SketchPages<kWords>& pages,
                     const CodeHeads& heads, const Numbers& s_numbers, const RefinedHead (&s_heads)[kHeads], Segment& s,
                     int begin, int stop, int part) {
  const auto after = [](int first) {
    const int next = first + kTokens;
    return next % kSegment ? next : next + (kScanWarps - 1) * kSegment;
  };
  const Lane<kWords> lane(s_numbers);
  const int last = length_of(op, heads.row) - 1;
  const __half* all_uppers = scratch.uppers + (heads.row * op.q_heads + heads.first) * scratch.capacity;
  const RefinedHead* own_heads = s_heads + lane.head(0);
  if (begin >= stop) return;
  uint2 uppers[2];
  Fine<kWords>::load_uppers(uppers, all_uppers, scratch.capacity, heads.count, begin);
  Fine<kWords> next;
  next.template load<kFine>(pages, uppers, own_heads, begin, stop);
  if (after(begin) < stop) {
    Fine<kWords>::load_uppers(uppers, all_uppers, scratch.capacity, heads.count, after(begin));
  }
#pragma unroll 1
  for (int first = begin; first < stop; first = after(first)) {
    const Fine<kWords> tile = next;
    const int second = after(first), third = after(second);
    if (second < stop) next.template load<kFine>(pages, uppers, own_heads, second, stop);
    if (third < stop) Fine<kWords>::load_uppers(uppers, all_uppers, scratch.capacity, heads.count, third);
    if (__ballot_sync(kAllLanes, tile.wanted != 0) != 0) {
      const auto distance = static_cast<float>(first + 4 * lane.own_row() - last);
      const float floors[2] = {own_heads[0].floor, own_heads[1].floor};
      uint32_t marks = 0;
      float worth[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float bounds[2] = {tile.upper_of(tile.uppers[0], i), tile.upper_of(tile.uppers[1], i)};
        if constexpr (kFine) {
          int products[2];
          lane.multiply(tile.words[i], products);
          const float step = sketch::step_of(byte_of(tile.scales, i));
          const float coarse = byte_of(tile.coarse, i), fine = byte_of(tile.fine, i);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float bias = own_heads[j].slope * (distance + static_cast<float>(i));
            const sketch::QueryCode& code = s_numbers.codes[lane.head(j)];
            bounds[j] = fminf(bounds[j], code.refined(bounds[j], products[j], step, coarse, fine, bias));
          }
        }
        marks |= static_cast<uint32_t>(!(bounds[0] <= floors[0]) || !(bounds[1] <= floors[1])) << i;
        if (kCapped) {
          worth[i] = larger(own_heads[0].worth.of(bounds[0] - floors[0]), own_heads[1].worth.of(bounds[1] - floors[1]));
        }
      }
      marks &= tile.wanted;
      marks |= __shfl_xor_sync(kAllLanes, marks, 1);
      const int row = lane.own_row() % 8;
      const bool speaks = lane.part() % 2 == 0;
      if (kCapped) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          worth[i] = larger(worth[i], __shfl_xor_sync(kAllLanes, worth[i], 1));
          if (speaks && marks >> i & 1) {
            s.merits[first % kSegment + 4 * lane.own_row() + i] = static_cast<uint8_t>(sketch::merit_of(worth[i]));
          }
        }
      }
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const bool own = speaks && lane.part() / 2 == w;
        const uint32_t word = __reduce_or_sync(kAllLanes, own ? marks << 4 * row : 0);
        if (threadIdx.x % 32 == 0) s.marks[first % kSegment / 32 + w] = word;
      }
    }
    if (second >= stop || second / kSegment != first / kSegment) {
      s.finish(scratch, heads.row * op.kv_heads + heads.kv_head, first / kSegment, part == 0,
               part == CodeHeads::parts(op) - 1);
    }
  }
}

template <int kWords, bool kFine, bool kCapped>
__global__ void __launch_bounds__(kScanThreads, kOccupancy<kWords> - (kCapped && kOccupancy<kWords> > 1))
    refine(SelectSketch op, Scratch scratch) {
  take_turn();
  __shared__ Numbers s_numbers;
  __shared__ Segment s_segments[kScanWarps];
  __shared__ RefinedHead s_heads[kHeads];
  const int thread = threadIdx.x;
  Segment& s = s_segments[thread / 32];
  for (int i = thread % 32; i < kSegment; i += 32) s.marks[i % Segment::kWords] = s.merits[i] = 0;
  const auto units_of = [&](int list) { return ceil_div(length_of(op, list / op.kv_heads), kScanWarps * kSegment); };
  Share::of_block<kScanThreads>(op.batch * op.kv_heads, units_of).visit(units_of, [&](int list, int unit, int of_list) {
    const int64_t row = list / op.kv_heads;
    const int kv_head = list % op.kv_heads;
    const int begin = (unit * kScanWarps + thread / 32) * kSegment;
    const int stop = min(length_of(op, row), (unit + of_list) * kScanWarps * kSegment);
    const SketchPages<kWords> pages(op, row, kv_head);
#pragma unroll 1
    for (int part = 0; part < CodeHeads::parts(op); ++part) {
      const CodeHeads heads(op, row, kv_head, part);
      s_numbers.set(op, heads);
      if (thread < kHeads) s_heads[thread] = RefinedHead::of(op, scratch, heads, thread);
      __syncthreads();
      mark<kWords, kFine, kCapped>(op, scratch, pages, heads, s_numbers, s_heads, s, begin, stop, part);
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
    const double lost = sum<kThreads>(left_out > 0 ? left_out * sketch::most_weight(merit) : 0.0);
    for (int h = thread; h < op.group; h += kThreads) {
      const int head = static_cast<int>(blockIdx.y) * op.group + h;
      const double below = (length_of(op, row) - total) * sketch::most_below(Entmax<double>(op.alpha.of(head)));
      op.delta_bound[row * op.q_heads + head] = sketch::rounded_up(lost + below);
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
  if (blockIdx.x == 0 && !scratch.merits) {
    for (int h = thread; h < op.group; h += kThreads) op.delta_bound[list * op.group + h] = 0;
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
    const auto refines = [&](auto capped) {
      launch(name, op.fine ? refine<words, true, capped> : refine<words, false, capped>, grid, stream, op, scratch);
    };
    scratch.merits ? refines(std::true_type{}) : refines(std::false_type{});
  });
  const dim3 words(std::max(1, ceil_div(scratch.capacity / 32, kThreads)), op.kv_heads, op.batch);
  if (scratch.merits) launch(name, cap, {words, kThreads}, stream, op, scratch);
  launch(name, list_marked, {words, kThreads}, stream, op, scratch);
}

}  // namespace entmaxkv::cuda
