// Dot products of tiles of 32 rows (keys, or statistics of pages) with the query heads of a group, by one warp.
// Rows come through a ring of slots in shared memory, filled ahead by asynchronous copies of 16 bytes, of which the
// lanes of a warp take neighbouring ones: on an H200 copies of 64 bytes of a row at a time reach 3.0 TB/s, those of
// whole rows 3.8. 16-bit rows meet the heads in tensor cores, rows as M and heads as N; fp32 rows, and squares of
// fp16, are multiplied in fp32.
//   A lane has the products of rows 4 g ... 4 g + 3, g = lane / 4, with heads 2 p and 2 p + 1, p = lane % 4. Of each 32
// dimensions it multiplies 8. A dot product does not care for the order of its dimensions: the 8 that lie together in
// memory are the lane's part of two k-slices.
#pragma once

#include "device.cuh"

namespace entmaxkv::cuda {

constexpr int kTileRows = 32;
constexpr int kTileHeads = 8;  // query heads that share one reading of the rows

/// Query heads that read the rows of a KV head together: a group, or a part of a large one.
struct HeadGroup {
  int kv_head, first_head, heads;

  __host__ __device__ static int per_kv_head(const Sizes& sizes) { return ceil_div(sizes.group, kTileHeads); }
  __host__ __device__ static int per_row(const Sizes& sizes) { return sizes.kv_heads * per_kv_head(sizes); }

  __device__ HeadGroup() {}  // for shared memory

  __device__ HeadGroup(const Sizes& sizes, int index) : kv_head(index / per_kv_head(sizes)) {
    const int part = index % per_kv_head(sizes);
    first_head = kv_head * sizes.group + part * kTileHeads;
    heads = min(kTileHeads, sizes.group - part * kTileHeads);
  }
};

/// How rows are held: in kRounds of 32 dimensions, copied 16 bytes at a time or one element.
template <int kRoundsOf32, bool kInVectors>
struct Layout {
  static constexpr int kRounds = kRoundsOf32;
  static constexpr int kDims = 32 * kRounds;
  static constexpr bool kVectors = kInVectors;
};

/// Whether rows can be read 16 bytes at a time.
inline bool in_vectors(const Rows& rows, Dtype dtype, int head_dim) {
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  int64_t all = reinterpret_cast<int64_t>(rows.data) | head_dim * bytes;
  for (const int64_t stride : rows.stride) all |= stride * bytes;
  return all % 16 == 0;
}

/// Calls body with the smallest Layout for head_dim. Odd sizes and alignments share one.
template <typename Body>
void dispatch_layout(int head_dim, bool vectors, Body body) {
  if (!vectors) return body(Layout<8, false>{});
  if (head_dim <= 64) return body(Layout<2, true>{});
  if (head_dim <= 128) return body(Layout<4, true>{});
  return body(Layout<8, true>{});
}

/// What a lane has of the products of a tile: of row 4 (lane / 4) + i and head 2 (lane % 4) + j.
struct Products {
  float of[4][2] = {};

  static __device__ int row(int i) { return static_cast<int>(threadIdx.x % 32) / 4 * 4 + i; }
  static __device__ int head(int j) { return static_cast<int>(threadIdx.x % 4) * 2 + j; }
};

/// The ALiBi slopes of this lane's heads, 0 for heads that are not there.
struct LaneSlopes {
  float of[2] = {};

  __device__ LaneSlopes(const Scoring& scoring, const HeadGroup& group) {
    for (int j = 0; j < 2; ++j) {
      if (Products::head(j) < group.heads) of[j] = scoring.slope(group.first_head + Products::head(j));
    }
  }
};

/// Queries of a group in shared memory, zeros behind head_dim.
template <typename T, typename Layout>
struct Queries {
  alignas(16) T values[kTileHeads * Layout::kDims];

  __device__ void set(int h, int d, float value) { values[h * Layout::kDims + d] = from_float<T>(value); }
};

/// The queries of a group on their way to shared memory: loaded by all kThreads threads, each its share, as far as
/// there are registers to hold it.
template <typename T, typename Layout, int kThreads>
class QueryLoad {
 public:
  __device__ QueryLoad(const Rows& q, int64_t row, const HeadGroup& group, int head_dim)
      : q_(q), row_(row), group_(group), head_dim_(head_dim) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) values_[i] = load(i);
  }

  /// Calls body(h, d, q_d) for each head of a full group and each dimension of the layout, zeros where there is none.
  template <typename Body>
  __device__ void store(Body body) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) body(head(i), dimension(i), to_float(values_[i]));
    for (int i = kHeld; i < kOwn; ++i) body(head(i), dimension(i), to_float(load(i)));
  }

 private:
  static constexpr int kOwn = ceil_div(kTileHeads * Layout::kDims, kThreads);
  static constexpr int kHeld = std::min(kOwn, 8);
  static_assert(kOwn * kThreads == kTileHeads * Layout::kDims);

  static __device__ int head(unsigned i) { return (i * kThreads + threadIdx.x) / Layout::kDims; }
  static __device__ int dimension(unsigned i) { return (i * kThreads + threadIdx.x) % Layout::kDims; }

  __device__ T load(int i) const {
    const bool there = head(i) < group_.heads && dimension(i) < head_dim_;
    return there ? q_.at<T>(row_, group_.first_head + head(i))[dimension(i)] : from_float<T>(0);
  }

  const Rows& q_;
  int64_t row_;
  HeadGroup group_;
  int head_dim_;
  T values_[kHeld];
};

/// 16 bytes of a row from dimension d on, zeros behind head_dim; in one load, if the rows are in vectors.
template <bool kVectors, typename T>
__device__ uint4 load_word(const T* row, int d, int head_dim) {
  constexpr int kCount = 16 / sizeof(T);
  if (d >= head_dim) return {0, 0, 0, 0};
  if constexpr (kVectors) {
    return __ldg(reinterpret_cast<const uint4*>(row + d));
  } else {
    alignas(16) T values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = d + i < head_dim ? row[d + i] : from_float<T>(0);
    return *reinterpret_cast<const uint4*>(values);
  }
}

template <typename T>
__device__ void unpack(const uint4& word, float (&values)[16 / sizeof(T)]) {
  const T* from = reinterpret_cast<const T*>(&word);
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) values[i] = to_float(from[i]);
}

/// The rows of a tile in shared memory.
template <typename T, typename Layout>
struct Slot {
  static constexpr int kWords = Layout::kDims * static_cast<int>(sizeof(T)) / 16;  // of a row
  static constexpr int kLanePart = kWords / 4;                                     // those that one lane multiplies
  uint4 words[kTileRows * kWords];

  /// Neighbours, and rows 4 apart, are read together: they stand in different banks.
  __device__ static int index(int row, int word) { return row * kWords + (word ^ (row & 7)); }

  __device__ const uint4& word(int row, int nth) const {
    return words[index(row, 4 * nth + static_cast<int>(threadIdx.x % 4))];
  }

  /// Begins to copy 32 rows, of which lane i knows where row i is. All lanes call.
  __device__ void load(const T* row, int head_dim) {
    constexpr int kCount = 16 / sizeof(T);
    const auto address = reinterpret_cast<unsigned long long>(row);
#pragma unroll 4  // small kernels wait for their instructions
    for (int i = 0; i < kWords; ++i) {
      const int at = i * 32 + static_cast<int>(threadIdx.x % 32), from = at / kWords, nth = at % kWords;
      const T* its_row = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, from));
      uint4& to = words[index(from, nth)];
      if constexpr (Layout::kVectors) {
        copy_async(to, its_row + nth * kCount, nth * kCount < head_dim);
      } else {
        to = load_word<false>(its_row, nth * kCount, head_dim);
      }
    }
  }
};

constexpr int kRingBytes = 64 << 10;  // at most

/// A ring of slots for each warp of a block that multiplies tiles, in its dynamic shared memory.
template <typename TheT, typename TheLayout, int kMostWarps>
struct Ring {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kSlotBytes = sizeof(Slot<T, Layout>);
  static constexpr int kWarps = std::min(kMostWarps, kRingBytes / kSlotBytes);
  static constexpr int kSlots = std::min(4, kRingBytes / kSlotBytes / kWarps);
  static constexpr int kBytes = kWarps * kSlots * kSlotBytes;

  static __device__ Slot<T, Layout>& slot(int nth) {
    return reinterpret_cast<Slot<T, Layout>*>(dynamic_shared())[threadIdx.x / 32 * kSlots + nth];
  }
};

/// Of a block that does nothing else, and how many of those share a multiprocessor. On an H200 neither more warps nor
/// more slots are faster.
template <typename T, typename Layout>
using ScanRing = Ring<T, Layout, 4>;
template <typename Layout>
constexpr int kScanBlocks = Layout::kRounds == 8 ? 2 : 3;

/// How many of them registers must suffice for: compute capability 12.0 has shared memory for one.
template <typename Layout>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kScanOccupancy = 1;
#else
constexpr int kScanOccupancy = kScanBlocks<Layout>;
#endif

/// Says of a known number of tiles whether there is an nth.
struct Upto {
  int count;

  __device__ bool operator()(int n) const { return n < count; }
};

/// A warp's tiles on their way through its ring: kSlots of them are being loaded at any time. more(n) says whether
/// there is an nth tile, and lookup(n) finds in memory what row_of(n, found) needs to know where this lane's row of it
/// is; both are called one tile before.
template <typename Slots, typename More, typename Lookup, typename RowOf>
class TileStream {
 public:
  __device__ TileStream(Slots, More more, int head_dim, Lookup lookup, RowOf row_of)
      : head_dim_(head_dim), more_(more), lookup_(lookup), row_of_(row_of) {}

  /// Calls prepare() once the first tiles are under way, and then, for each tile in turn, read(n, slot) and, when its
  /// slot is being filled again, finish(n). All lanes call.
  template <typename Prepare, typename Read, typename Finish>
  __device__ void run(Prepare prepare, Read read, Finish finish) {
    if (more_(0)) next_ = lookup_(0);
#pragma unroll 1  // so that each part is there once
    for (int n = -Slots::kSlots, nth = 0;; ++n) {
      if (n == 0) prepare();
      if (n >= 0 && !more_(n)) break;
      if (n >= 0) {
        wait_for_copies<Slots::kSlots - 1>();
        __syncwarp();  // the other lanes' copies, too
        read(n, Slots::slot(nth));
        __syncwarp();  // all have read
      }
      load(n + Slots::kSlots, nth);
      if (n >= 0) finish(n);
      if (++nth == Slots::kSlots) nth = 0;
    }
  }

 private:
  __device__ void load(int n, int nth) {
    if (more_(n)) {
      const auto found = next_;
      if (more_(n + 1)) next_ = lookup_(n + 1);
      Slots::slot(nth).load(row_of_(n, found), head_dim_);
    }
    commit_copies();
  }

  int head_dim_;
  More more_;
  Lookup lookup_;
  RowOf row_of_;
  std::invoke_result_t<Lookup, int> next_{};
};

/// D = A B + C of 16 rows, 16 dimensions and 8 heads on a tensor core. All lanes call.
template <typename T>
__device__ void multiply_fragments(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1,
                                   const float (&c)[4] = {0, 0, 0, 0}) {
#ifdef EMULATE_CUDA
  emulation::multiply_fragments<T>(d, a, b0, b1, c);  // tests/emulation
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
#endif
}

/// Four transposed matrices of 8 x 8 16-bit elements: lane 8 m + i names row i of matrix m, and each lane gets elements
/// (2 (lane % 4) + 0 and 1, lane / 4) of all four. All lanes call.
__device__ inline uint4 load_transposed(const uint4& s_row) {
#ifdef EMULATE_CUDA
  return emulation::load_transposed(&s_row);  // tests/emulation
#else
  uint4 result;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(&s_row)))
               : "memory");
  return result;
#endif
}

/// products += row . query in fp32, or the rows' squares . query. All lanes call.
template <bool kSquares, typename T, typename Layout>
__device__ void multiply_plainly(const Slot<T, Layout>& slot, const Queries<float, Layout>& q, int heads,
                                 Products& products) {
  constexpr int kHeads = 4;  // at once
  constexpr int kCount = 16 / sizeof(T);
  const int part = threadIdx.x % 4;
#pragma unroll 1
  for (int first = 0; first < heads; first += kHeads) {
    float sums[kHeads][4] = {};
#pragma unroll 1
    for (int nth = 0; nth < Slot<T, Layout>::kLanePart; ++nth) {
      float rows[4][kCount];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unpack<T>(slot.word(Products::row(i), nth), rows[i]);
        for (float& x : rows[i]) x = kSquares ? x * x : x;
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float* weights = q.values + (first + h) * Layout::kDims + (4 * nth + part) * kCount;
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[h][i] = fmaf(rows[i][e], weights[e], sums[h][i]);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float sum = sums[h][i];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (part == (first + h) / 2) products.of[i][h % 2] += sum;
      }
    }
  }
}

/// products += row . query: of 16-bit rows in tensor cores. All lanes call.
template <typename T, typename Layout>
__device__ void multiply(const Slot<T, Layout>& slot, const Queries<T, Layout>& q, int heads, Products& products) {
  if constexpr (sizeof(T) == 4) {
    multiply_plainly<false>(slot, q, heads, products);
  } else {
    const int lane = threadIdx.x % 32;
    const auto* queries = reinterpret_cast<const uint4*>(q.values) + lane / 4 * (Layout::kDims / 8) + lane % 4;
#pragma unroll(Layout::kRounds == 8 ? 1 : 2)  // as far as there are registers
    for (int round = 0; round < Layout::kRounds; ++round) {
      const uint4 weights = queries[4 * round];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint4 &a = slot.word(Products::row(i), round), &b = slot.word(Products::row(i + 1), round);
        const uint4 rows[2] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};
        float d[2][4];
        multiply_fragments<T>(d[0], rows[0], weights.x, weights.y);
        multiply_fragments<T>(d[1], rows[1], weights.z, weights.w);
        // A tensor core truncates what it adds to; so it adds to nothing, and the sum is taken in fp32.
#pragma unroll
        for (int k = 0; k < 4; ++k) products.of[i + k / 2][k % 2] += d[0][k] + d[1][k];
      }
    }
  }
}

/// The squares of bf16 numbers, two to a word, as sums of two bf16: exact, but for squares below 1e-33.
struct Squares {
  uint4 high, low;

  __device__ explicit Squares(const uint4& x) {
    square(x.x, high.x, low.x);
    square(x.y, high.y, low.y);
    square(x.z, high.z, low.z);
    square(x.w, high.w, low.w);
  }

 private:
  static __device__ void square(uint32_t x, uint32_t& high, uint32_t& low) {
    const uint32_t minus_zeros = 0x80008000u, signs = 0x80008000u;
    high = multiply_add(x, x, minus_zeros);
    low = multiply_add(x, x, high ^ signs);
  }

  /// Of two pairs of bf16.
  static __device__ uint32_t multiply_add(uint32_t x, uint32_t y, uint32_t z) {
#ifdef EMULATE_CUDA
    return emulation::multiply_add(x, y, z);  // tests/emulation
#else
    uint32_t sums;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sums) : "r"(x), "r"(y), "r"(z));
    return sums;
#endif
  }
};

/// products += row squared . weights, which are sums of two bf16 as well: in tensor cores, small products first. All
/// lanes call.
template <typename Layout>
__device__ void multiply_squares(const Slot<__nv_bfloat16, Layout>& slot, const Queries<__nv_bfloat16, Layout>& high,
                                 const Queries<__nv_bfloat16, Layout>& low, Products& products) {
  using T = __nv_bfloat16;
  const int lane = threadIdx.x % 32, own = lane / 4 * (Layout::kDims / 8) + lane % 4;
#pragma unroll 1
  for (int round = 0; round < Layout::kRounds; ++round) {
    const uint4 h = reinterpret_cast<const uint4*>(high.values)[own + 4 * round];
    const uint4 l = reinterpret_cast<const uint4*>(low.values)[own + 4 * round];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint4 &a = slot.word(Products::row(i), round), &b = slot.word(Products::row(i + 1), round);
      const Squares rows[2] = {Squares({a.x, b.x, a.y, b.y}), Squares({a.z, b.z, a.w, b.w})};
      float d[2][4];
      multiply_fragments<T>(d[0], rows[0].low, l.x, l.y);
      multiply_fragments<T>(d[1], rows[1].low, l.z, l.w);
      multiply_fragments<T>(d[0], rows[0].high, l.x, l.y, d[0]);
      multiply_fragments<T>(d[1], rows[1].high, l.z, l.w, d[1]);
      multiply_fragments<T>(d[0], rows[0].low, h.x, h.y, d[0]);
      multiply_fragments<T>(d[1], rows[1].low, h.z, h.w, d[1]);
      multiply_fragments<T>(d[0], rows[0].high, h.x, h.y, d[0]);
      multiply_fragments<T>(d[1], rows[1].high, h.z, h.w, d[1]);
#pragma unroll
      for (int k = 0; k < 4; ++k) products.of[i + k / 2][k % 2] += d[0][k] + d[1][k];
    }
  }
}

}  // namespace entmaxkv::cuda
