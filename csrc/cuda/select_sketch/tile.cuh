// Dot products of a sketch's codes with query heads, on tensor cores, by one warp.
//   codes [64 tokens, dims] in 0 ... 3, queries [4 heads, dims] as integers of 15 bits -> products [64, 4], exact
// The rows of the integer matrix product are tokens. Its 8 columns are the high parts of the queries of kHeads heads,
// and then their low parts of 7 bits. The order of dimensions does not change a dot product: so a lane multiplies
// successive bytes of a token's codes.
#pragma once

#include "../../sketch.h"
#include "../common/matrix_product.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda {

namespace sketch_tile {

constexpr int kHeads = 4;    // query heads that share one reading of the codes
constexpr int kTokens = 64;  // tokens of a tile, which a warp multiplies together: 4 matrices of 16 rows
constexpr int kScanThreads = 128, kScanWarps = kScanThreads / 32;

/// Up to kHeads query heads of a KV head, which read its codes together.
struct CodeHeads {
  int64_t row;
  int kv_head, first, count;

  /// Returns how many such parts the query heads of a KV head make.
  static __host__ __device__ int parts(const Sizes& sizes) { return ceil_div(sizes.group, kHeads); }

  __device__ CodeHeads(const Sizes& sizes, int64_t row, int kv_head, int part)
      : row(row),
        kv_head(kv_head),
        first(kv_head * sizes.group + part * kHeads),
        count(min(kHeads, sizes.group - part * kHeads)) {}

  /// Returns the ALiBi slope of the h-th head, 0 if there is none.
  __device__ float slope(const SelectSketch& op, int h) const { return h < count ? op.scoring.slope(first + h) : 0; }
};

/// A rotated query (sketch.h): of[i] is dimension 32 i + lane. All lanes call every function.
struct Rotated {
  static constexpr int kOwn = sketch::kMaxDims / 32;
  float of[kOwn];

  template <typename T>
  __device__ Rotated(const T* row, int head_dim, float factor) {
    const int lane = threadIdx.x % 32, dims = sketch::dims_of(head_dim), rotation = sketch::rotation_of(dims);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int d = 32 * i + lane;
      of[i] = d < head_dim ? to_float(row[d]) * (factor * sketch::sign_of(d)) : 0.0f;
    }
#pragma unroll
    for (int step = 1; step < kOwn; step *= 2) {
      if (32 * step >= rotation) break;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (i & step) continue;
        const float sum = of[i] + of[i | step];
        of[i | step] = of[i] - of[i | step];
        of[i] = sum;
      }
    }
    const float scale = 1 / sqrtf(static_cast<float>(rotation));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (32 * i >= dims) break;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, of[i], distance);
        of[i] = lane & distance ? other - of[i] : of[i] + other;
      }
      of[i] *= scale;
    }
  }

  /// Returns the Euclidean norm to all lanes.
  __device__ float norm() const {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) squares = fmaf(of[i], of[i], squares);
    return sqrtf(sum<32>(squares));
  }

  /// Returns the largest absolute value of a coordinate to all lanes, NaN if some coordinate is NaN.
  __device__ float largest() const {
    float most = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) most = larger(most, fabsf(of[i]));
    return cuda::largest<32>(most);
  }
};

/// Returns the rotated query of a head, times the scale. All lanes call.
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

/// The rotated queries of up to kHeads heads as integers, in shared memory.
struct Numbers {
  static constexpr int kColumns = 8;  // the high parts of kHeads heads, then the low parts
  alignas(16) int8_t values[kColumns][sketch::kMaxDims];
  sketch::QueryCode codes[kHeads];

  /// Sets the numbers of these heads. All threads of a block of kScanThreads call; a barrier follows.
  __device__ void set(const SelectSketch& op, const CodeHeads& heads) {
    static_assert(kScanWarps == kHeads);
    const int h = threadIdx.x / 32, lane = threadIdx.x % 32, dims = sketch::dims_of(op.head_dim);
    __syncthreads();  // all threads have read the numbers of earlier heads
    const bool there = h < heads.count;
    const Rotated r = rotated(op, heads.row, heads.first + (there ? h : 0));
    const float largest = r.largest(), norm = r.norm();
    const float of_head = largest <= sketch::kMostQuery ? sketch::unit_of(largest) : kUndefined;
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
    if (lane == 0) codes[h] = sketch::QueryCode(of_head, own_sum, norm, distance, dims, op.error_factor);
    __syncthreads();
  }
};

/// C += A B on a tensor core, A [16 rows, 32] of unsigned bytes, B [32, 8 columns] of signed bytes, in the fragment
/// layout of PTX mma.m16n8k32. All lanes call.
__device__ void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef EMULATE_CUDA
  emulation::multiply_bytes(c, a, b0, b1);  // tests/emulation
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// A lane's part of the product of a tile: it multiplies kWords words of each row of its tokens, and gets the products
/// of four successive tokens with two heads. With lane = 4 g + t:
///   matrix i has as row r the token 4 r + i of the tile
///   the lane multiplies rows g and g + 8 of each matrix
///   the lane gets the products of row g (t < 2) or g + 8 (t >= 2) with heads 2 (t % 2) and 2 (t % 2) + 1
template <int kWords>
struct Lane {
  static constexpr int kFragments = 4 * kWords;
  uint32_t fragments[kFragments];  // this lane's column of the query numbers, four dimensions per word

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

  /// Multiplies one matrix; words[w][m] is word m of this lane's part of row(w). All lanes call.
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
    // Columns 0 ... 3 are high parts, columns 4 ... 7 low parts. Lane ^ 2 has the other part for this lane's row.
    const bool lower = part() < 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int got = __shfl_xor_sync(kAllLanes, lower ? c[2 + j] : c[j], 2);
      products[j] = lower ? 128 * c[j] + got : 128 * got + c[2 + j];
    }
  }
};

/// Loads this lane's words of a row of codes.
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

/// Finds the sketch of the tokens of a (row, KV head): this lane's part of rows of codes, and the norms.
template <int kWords>
struct SketchPages {
  static constexpr int kRowBytes = 16 * kWords;

  const uint8_t *codes, *norms;  // codes and norms of page 0
  const int32_t* table;
  uint32_t page_codes, page_norms;  // bytes from one page to the next
  int page_size, page_bits;

  __device__ SketchPages(const SelectSketch& op, int64_t row, int kv_head)
      : codes(op.sketch.plane(kv_head, 0, op.page_size, kRowBytes) + 4 * kWords * Lane<kWords>::part()),
        norms(op.sketch.norm(kv_head, 0, op.page_size)),
        table(op.page_table.row(row)),
        page_codes(op.kv_heads * 2 * op.page_size * kRowBytes),
        page_norms(op.kv_heads * 3 * op.page_size),
        page_size(op.page_size),
        page_bits(log2_of(op.page_size)) {}

  __device__ uint32_t page(int token) const { return static_cast<uint32_t>(table[token >> page_bits]); }

  /// Returns the address of a token's codes. The codes of the page's next token are kRowBytes further.
  __device__ const uint8_t* codes_of(uint32_t page, int token, int plane) const {
    return codes + uint64_t{page} * page_codes + ((plane << page_bits) + slot(token)) * kRowBytes;
  }

  /// Returns scales (0), coarse norms (1) or fine norms (2) of four successive tokens of the page, a byte each.
  __device__ uint32_t norms_of(uint32_t page, int token, int which) const {
    return __ldg(
        reinterpret_cast<const uint32_t*>(norms + uint64_t{page} * page_norms + ((which << page_bits) + slot(token))));
  }

 private:
  __device__ int slot(int token) const { return token & (page_size - 1); }
};

/// Plane 0 of a tile: this lane's part of the codes, and the scales and coarse norms of its four tokens.
template <int kWords>
struct Coarse {
  uint32_t words[4][2][kWords];
  uint32_t scales, norms;

  /// Loads the tile that begins at token `first`. Codes behind the row's token `last` are arbitrary. All lanes call.
  __device__ void load(const SketchPages<kWords>& pages, int first, int last) {
    uint32_t page[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) page[w] = pages.page(min(first + 4 * Lane<kWords>::row(w), last));
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint8_t* codes = pages.codes_of(page[w], first + 4 * Lane<kWords>::row(w), 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_words<kWords>(words[i][w], codes + i * pages.kRowBytes);
    }
    const int own = first + 4 * Lane<kWords>::own_row();
    const uint32_t own_page = Lane<kWords>::part() < 2 ? page[0] : page[1];
    scales = pages.norms_of(own_page, own, 0);
    norms = pages.norms_of(own_page, own, 1);
  }
};

/// Returns a byte of a word as a float, with fewer instructions than a conversion.
__device__ float byte_of(uint32_t word, int nth) {
  return __uint_as_float(__byte_perm(word, 0x4b000000, 0x7540 + nth)) - 0x1p23f;
}

}  // namespace sketch_tile

}  // namespace entmaxkv::cuda
