// Dot products of tiles of 32 rows (keys, or statistics of pages) with up to 8 query heads of a group, by one warp.
//   rows [32, head_dim], queries [8, head_dim] -> products [32, 8] in fp32
// Rows come through a ring of slots in shared memory (ring.cuh). The lanes of a warp copy neighbouring 16-byte words:
// on an H200 copies of whole rows reach 3.8 TB/s, copies of 64 bytes of a row at a time 3.0 TB/s. Tensor cores multiply
// 16-bit rows, with rows as M and heads as N. fp32 rows and squares of fp16 are multiplied in fp32.
//   Lane 4 g + p has the products of rows 4 g ... 4 g + 3 with heads 2 p and 2 p + 1. It multiplies 8 of each 32
// dimensions. The order of dimensions does not change a dot product: so the 8 dimensions that are adjacent in memory
// serve as the lane's part of two k-slices.
#pragma once

#include "ring.cuh"

namespace entmaxkv::cuda {

constexpr int kTileHeads = 8;  // query heads that share one reading of the rows

/// The query heads that read the rows of a KV head together: a group, or a part of a group of more than kTileHeads.
struct HeadGroup {
  int kv_head, first_head, heads;

  __host__ __device__ static int per_kv_head(const Sizes& sizes) { return ceil_div(sizes.group, kTileHeads); }
  __host__ __device__ static int per_row(const Sizes& sizes) { return sizes.kv_heads * per_kv_head(sizes); }

  __device__ HeadGroup() {}  // for shared memory

  __device__ HeadGroup(const Sizes& sizes, int index) {
    const int parts = per_kv_head(sizes);
    kv_head = parts == 1 ? index : index / parts;  // a division is many instructions
    const int part = index - kv_head * parts;
    first_head = kv_head * sizes.group + part * kTileHeads;
    heads = min(kTileHeads, sizes.group - part * kTileHeads);
  }
};

/// This lane's products of a tile: of[i][j] belongs to row(i) and head(j).
struct Products {
  float of[4][2] = {};

  static __device__ int row(int i) { return static_cast<int>(threadIdx.x % 32) / 4 * 4 + i; }
  static __device__ int head(int j) { return static_cast<int>(threadIdx.x % 4) * 2 + j; }
};

/// The ALiBi slopes of this lane's heads, 0 for heads that the group does not have.
struct LaneSlopes {
  float of[2] = {};

  __device__ LaneSlopes() {}

  __device__ LaneSlopes(const Scoring& scoring, const HeadGroup& group) {
    for (int j = 0; j < 2; ++j) {
      if (Products::head(j) < group.heads) of[j] = scoring.slope(group.first_head + Products::head(j));
    }
  }
};

/// The queries of a group in shared memory, [kTileHeads, kDims], with zeros from head_dim on.
template <typename T, typename Layout>
struct Queries {
  alignas(16) T values[kTileHeads * Layout::kDims];

  __device__ void set(int h, int d, float value) { values[h * Layout::kDims + d] = from_float<T>(value); }
};

/// Loads the queries of a group into registers when it is constructed, and passes them on in store(). Each of the
/// kBlockThreads threads handles kOwn elements; those beyond kHeld are loaded only in store(). All threads call.
template <typename T, typename Layout, int kBlockThreads>
class QueryLoad {
 public:
  __device__ QueryLoad(const Rows& q, int64_t row, const HeadGroup& group, int head_dim)
      : q_(q), row_(row), group_(group), head_dim_(head_dim) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) values_[i] = load(i);
  }

  /// Calls body(h, d, q_d) for each of kTileHeads heads and kDims dimensions. q_d is 0 where the group has no such head
  /// or d >= head_dim.
  template <typename Body>
  __device__ void store(Body body) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) body(head(i), dimension(i), to_float(values_[i]));
    for (int i = kHeld; i < kOwn; ++i) body(head(i), dimension(i), to_float(load(i)));
  }

 private:
  static constexpr int kOwn = ceil_div(kTileHeads * Layout::kDims, kBlockThreads);
  static constexpr int kHeld = std::min(kOwn, 8);
  static_assert(kOwn * kBlockThreads == kTileHeads * Layout::kDims);

  static __device__ int head(unsigned i) { return (i * kBlockThreads + threadIdx.x) / Layout::kDims; }
  static __device__ int dimension(unsigned i) { return (i * kBlockThreads + threadIdx.x) % Layout::kDims; }

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

/// Loads the queries of a group, with zeros where there is no head or dimension. vectors: 16 bytes can be read at a
/// time. All lanes of a warp call.
template <typename T, typename Layout>
__device__ void load_queries(const Rows& q, int64_t row, const HeadGroup& group, int head_dim, bool vectors,
                             Queries<T, Layout>& s_q) {
  constexpr int kCount = 16 / sizeof(T), kWords = Layout::kDims / kCount;  // of a query
  auto* s_words = reinterpret_cast<uint4*>(s_q.values);
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < kTileHeads * kWords; i += 32) {
    const int h = i / kWords, d = i % kWords * kCount;
    const T* query = q.at<T>(row, group.first_head + min(h, group.heads - 1));
    const int dims = h < group.heads ? head_dim : 0;
    s_words[i] = vectors ? load_word<true>(query, d, dims) : load_word<false>(query, d, dims);
  }
}

/// D = A B + C on a tensor core, A [16 rows, 16 dimensions], B [16 dimensions, 8 heads], in the fragment layout of PTX
/// mma.m16n8k16. All lanes call.
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

/// Loads four 8 x 8 matrices of 16-bit elements, transposed (ldmatrix). Lane 8 m + i passes row i of matrix m. Each
/// lane gets elements (2 (lane % 4), lane / 4) and (2 (lane % 4) + 1, lane / 4) of each matrix. All lanes call.
__device__ inline uint4 load_transposed(const uint4& s_row) {
#ifdef EMULATE_CUDA
  return emulation::load_transposed(&s_row);  // tests/emulation
#else
  uint4 result;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w)
               : "r"(shared_address(&s_row))
               : "memory");
  return result;
#endif
}

/// products += row . query in fp32; kSquares: products += (row squared elementwise) . query. All lanes call.
template <bool kSquares, typename Slot>
__device__ void multiply_plainly(const Slot& slot, const Queries<float, typename Slot::Layout>& q, int heads,
                                 Products& products) {
  using T = typename Slot::T;
  using Layout = typename Slot::Layout;
  constexpr int kHeads = 4;  // heads at once
  constexpr int kCount = 16 / sizeof(T);
  const int part = threadIdx.x % 4;
#pragma unroll 1
  for (int first = 0; first < heads; first += kHeads) {
    float sums[kHeads][4] = {};
#pragma unroll 1
    for (int nth = 0; nth < Slot::kLanePart; ++nth) {
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

/// products += row . query, on tensor cores for 16-bit rows. All lanes call.
template <typename Slot>
__device__ void multiply(const Slot& slot, const Queries<typename Slot::T, typename Slot::Layout>& q, int heads,
                         Products& products) {
  using T = typename Slot::T;
  using Layout = typename Slot::Layout;
  if constexpr (sizeof(T) == 4) {
    multiply_plainly<false>(slot, q, heads, products);
  } else {
    const int lane = threadIdx.x % 32;
    const auto* queries = reinterpret_cast<const uint4*>(q.values) + lane / 4 * (Layout::kDims / 8) + lane % 4;
#pragma unroll(Layout::kRounds == 8 ? 1 : 2)  // more would need more registers than a thread has
    for (int round = 0; round < Layout::kRounds; ++round) {
      const uint4 weights = queries[4 * round];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint4 &a = slot.word(Products::row(i), round), &b = slot.word(Products::row(i + 1), round);
        const uint4 rows[2] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};
        float d[2][4];
        multiply_fragments<T>(d[0], rows[0], weights.x, weights.y);
        multiply_fragments<T>(d[1], rows[1], weights.z, weights.w);
        // A tensor core truncates its accumulator. So it adds to 0, and the sum is taken in fp32.
#pragma unroll
        for (int k = 0; k < 4; ++k) products.of[i + k / 2][k % 2] += d[0][k] + d[1][k];
      }
    }
  }
}

/// The squares of 8 bf16 numbers as sums of two bf16, high + low. Exact except for squares below 1e-33.
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

  /// Returns x y + z for two bf16 in each word.
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

/// products += (row squared elementwise) . (high + low) on tensor cores. Small terms are added first. All lanes call.
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
