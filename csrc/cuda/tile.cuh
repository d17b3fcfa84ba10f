// Dot products of a warp's tile of 32 rows (keys, or statistics of pages) with the query heads of a group.
// Rows are read once, in 16-byte loads of which a lane has up to 16 in flight at any time. 16-bit rows meet the heads
// in tensor cores, heads as M and rows as N; fp32 rows, and squares, are multiplied in fp32.
//   A lane takes rows g, g + 8, g + 16 and g + 24, g = lane / 4, and of each 32 dimensions 8. A dot product does not
//   care for the order of its dimensions: the 8 that lie together in memory are the lane's part of two k-slices, and
//   go to the tensor core from the registers that they were loaded into.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace entmaxkv::cuda {

constexpr int kTileRows = 32;
constexpr int kTileHeads = 16;  // query heads that share one reading of the rows

/// Query heads that read the rows of a KV head together: a group, or a part of a large one.
struct HeadGroup {
  int kv_head, first_head, heads;

  __host__ __device__ static int per_kv_head(const Sizes& sizes) { return ceil_div(sizes.group, kTileHeads); }
  __host__ __device__ static int per_row(const Sizes& sizes) { return sizes.kv_heads * per_kv_head(sizes); }

  __device__ HeadGroup(const Sizes& sizes, int index) : kv_head(index / per_kv_head(sizes)) {
    const int part = index % per_kv_head(sizes);
    first_head = kv_head * sizes.group + part * kTileHeads;
    heads = min(kTileHeads, sizes.group - part * kTileHeads);
  }
};

/// How rows are held: in kRounds of 32 dimensions, read 16 bytes at a time or one element.
template <int kRoundsOf32, bool kInVectors>
struct Layout {
  static constexpr int kRounds = kRoundsOf32;
  static constexpr bool kVectors = kInVectors;
};

/// Results of one warp. Rows of 40 keep a fragment's stores for four heads in different banks.
using Products = float[kTileHeads][kTileRows + 8];

/// The queries of a tile in shared memory, zeros behind head_dim: 16-bit ones as a tensor core takes them,
/// [k-slice][lane][8], fp32 ones as [head][dimension]. What stands for heads that are not there goes into no result.
template <typename T, typename Layout>
struct Queries {
  static constexpr int kDims = 32 * Layout::kRounds;
  alignas(16) T values[kTileHeads * kDims];

  static __device__ int index(int h, int d) {
    if constexpr (sizeof(T) == 4) return h * kDims + d;
    const int slice = d / 32 * 2 + d % 8 / 4, lane = h % 8 * 4 + d % 32 / 8;
    return (slice * 32 + lane) * 8 + d % 4 / 2 * 4 + h / 8 * 2 + d % 2;
  }

  __device__ void set(int h, int d, float value) { values[index(h, d)] = from_float<T>(value); }

  /// This lane's part of a k-slice.
  __device__ uint4 fragment(int slice) const {
    return reinterpret_cast<const uint4*>(values)[slice * 32 + threadIdx.x % 32];
  }
};

/// Calls body(h, d, q_d) for heads first_head + h, h < heads, of a row and all dimensions of the layout, zeros behind
/// head_dim. All threads call, each has its share.
template <typename T, typename Layout, typename Body>
__device__ void for_each_query(const Rows& q, int64_t row, int first_head, int heads, int head_dim, Body body) {
  constexpr int kDims = 32 * Layout::kRounds;
  constexpr int kRun = 4;  // loads in flight
  for (int first = threadIdx.x; first < heads * kDims; first += kRun * blockDim.x) {
    float values[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int at = first + i * blockDim.x, h = at / kDims, d = at % kDims;
      values[i] = h < heads && d < head_dim ? to_float(q.at<T>(row, first_head + h)[d]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int at = first + i * blockDim.x;
      if (at < heads * kDims) body(at / kDims, at % kDims, values[i]);
    }
  }
}

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

/// The rows of successive tiles on their way through a lane's registers: as soon as rows have been multiplied, others
/// are loaded in their place. The lanes know where the 32 rows of a tile are, lane i row i.
template <typename T, typename Layout>
struct RowStream {
  static constexpr int kRounds = Layout::kRounds;
  static constexpr int kWords = sizeof(T) / 2;                                       // of 16 bytes, for 8 dimensions
  static constexpr int kHeld = kRounds * kWords <= 4 ? 4 : 16 / (kRounds * kWords);  // of the 4 rows of a tile
  uint4 words[kHeld][kRounds][kWords];

  /// The first dimension of a word of this lane.
  static __device__ int dimension(int round, int word) {
    constexpr int kCount = 16 / sizeof(T);
    return 32 * round + 4 * kCount * word + kCount * static_cast<int>(threadIdx.x % 4);
  }

  /// Loads what is held of the first tile. All lanes call.
  __device__ void start(const T* row, int head_dim) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) load(row, i, head_dim);
  }

  /// Loads in place of the nth row of a tile, which has been multiplied, what comes kHeld rows behind it: in the same
  /// tile, or in the next one, null if there is none. All lanes call.
  __device__ void follow(const T* row, const T* next_row, int nth, int head_dim) {
    if (nth + kHeld < 4) {
      load(row, nth + kHeld, head_dim);
    } else if (next_row) {
      load(next_row, nth + kHeld - 4, head_dim);
    }
  }

 private:
  __device__ void load(const T* row, int nth, int head_dim) {
    const auto address = reinterpret_cast<unsigned long long>(row);
    const int of = 8 * nth + threadIdx.x % 32 / 4;
    const T* from = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, of));
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        words[nth % kHeld][round][word] = load_word<Layout::kVectors>(from, dimension(round, word), head_dim);
      }
    }
  }
};

/// D = A B of 16 heads, 16 dimensions and 8 rows on a tensor core. All lanes call.
template <typename T>
__device__ void multiply_fragments(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
#ifdef EMULATE_CUDA
  emulation::multiply_fragments<T>(d, a, b0, b1);  // tests/emulation
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(0.0f));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(0.0f));
  }
#endif
}

/// sum += A B. A tensor core truncates what it adds to; so it adds to nothing, and the sum is taken in fp32.
template <typename T>
__device__ void add_product(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  float d[4];
  multiply_fragments<T>(d, a, b0, b1);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += d[i];
}

/// multiply in fp32: of 32-bit rows, or of the squares of any.
template <typename T, typename Layout, bool kSquares, bool kAdd>
__device__ void multiply_plainly(RowStream<T, Layout>& rows, const T* row, const T* next_row, int head_dim,
                                 const Queries<float, Layout>& q, int heads, Products& products) {
  using Stream = RowStream<T, Layout>;
  constexpr int kHeld = Stream::kHeld, kCount = 16 / sizeof(T);
  const int group = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
#pragma unroll
  for (int first = 0; first < 4; first += kHeld) {
#pragma unroll 1
    for (int h = 0; h < heads; ++h) {
      float sum[kHeld] = {};
#pragma unroll
      for (int round = 0; round < Stream::kRounds; ++round) {
#pragma unroll
        for (int word = 0; word < Stream::kWords; ++word) {
          const float* weights = q.values + q.index(h, Stream::dimension(round, word));
#pragma unroll
          for (int i = 0; i < kHeld; ++i) {
            float values[kCount];
            unpack<T>(rows.words[i][round][word], values);
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
              sum[i] = fmaf(kSquares ? values[e] * values[e] : values[e], weights[e], sum[i]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
        sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
        float& product = products[h][8 * (first + i) + group];
        if (part == h % 4) product = kAdd ? product + sum[i] : sum[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) rows.follow(row, next_row, first + i, head_dim);
  }
}

/// products[h][i] = or += row i . query h for the rows of a tile, which the stream has begun to load; it goes on to the
/// next tile, if that is not null. All lanes call. Results are in place after __syncwarp.
template <typename T, typename Layout, bool kAdd>
__device__ void multiply(RowStream<T, Layout>& rows, const T* row, const T* next_row, int head_dim,
                         const Queries<T, Layout>& q, int heads, Products& products) {
  if constexpr (sizeof(T) == 4) {
    multiply_plainly<T, Layout, false, kAdd>(rows, row, next_row, head_dim, q, heads, products);
  } else {
    using Stream = RowStream<T, Layout>;
    const int group = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum[4] = {};
#pragma unroll
      for (int round = 0; round < Stream::kRounds; ++round) {
        const uint4& word = rows.words[i % Stream::kHeld][round][0];
        add_product<T>(sum, q.fragment(2 * round), word.x, word.y);
        add_product<T>(sum, q.fragment(2 * round + 1), word.z, word.w);
      }
      rows.follow(row, next_row, i, head_dim);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int h = group + j / 2 * 8;
        float& product = products[h][8 * i + 2 * part + j % 2];
        if (h < heads) product = kAdd ? product + sum[j] : sum[j];
      }
    }
  }
}

}  // namespace entmaxkv::cuda
