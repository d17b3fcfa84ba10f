// Scores of a warp's tiles of keys, and weighted sums of its tiles of values, for up to 8 query heads of a group.
//   scores[h, i] = q[h] . k[i]
//   out[h, d] = sum_i weight[h, i] v[i, d]
#pragma once

#include "../common/matrix_product.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda {

/// The scores of a tile, and then the weights: a lane has those of head lane / 4 and tokens token(0) ... token(7).
struct TileScores {
  float of[8] = {};

  static __device__ int token(int i) { return static_cast<int>(threadIdx.x % 4) * 8 + i % 2 * 4 + i / 2; }
};

/// Shared memory in which fp32 kernels exchange the scores of a tile. kTileRows + 4 puts neighbouring heads into
/// different banks. For 16-bit keys, tensor cores leave each score with the lane that needs it.
template <typename T>
struct Exchange {};
template <>
struct Exchange<float> {
  alignas(16) float of[kTileHeads][kTileRows + 4];

  __device__ float& own(int i) { return of[threadIdx.x % 32 / 4][TileScores::token(i)]; }
};

/// Returns the products of a tile with the queries. Tensor cores multiply Q K^T, with heads as M and tokens as N; half
/// of M is not used. All lanes call.
template <typename Tile, typename T, typename Layout>
__device__ TileScores tile_products(const Tile& tile, const Queries<T, Layout>& q, int heads,
                                    [[maybe_unused]] Exchange<T>& s_exchange) {
  TileScores scores;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 4) {
    Products products;
    multiply(tile, q, heads, products);
#pragma unroll
    for (int i = 0; i < 8; ++i) s_exchange.of[Products::head(i % 2)][Products::row(i / 2)] = products.of[i / 2][i % 2];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) scores.of[i] = s_exchange.own(i);
  } else {
    const auto* queries = reinterpret_cast<const uint4*>(q.values) + lane / 4 * (Layout::kDims / 8) + lane % 4;
#pragma unroll 1
    for (int round = 0; round < Layout::kRounds; ++round) {
      const uint4 of_round = queries[4 * round];
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const uint4& keys = tile.word(lane / 4 * 4 + i / 2, round);
        float d[2][4];
        multiply_fragments<T>(d[0], {of_round.x, 0, of_round.y, 0}, keys.x, keys.y);
        multiply_fragments<T>(d[1], {of_round.z, 0, of_round.w, 0}, keys.z, keys.w);
        // A tensor core truncates its accumulator. So it adds to 0, and the sum is taken in fp32.
#pragma unroll
        for (int k = 0; k < 2; ++k) scores.of[i + k] += d[0][k] + d[1][k];
      }
    }
  }
  return scores;
}

/// A warp's sums sum_i weight_i v_i, for 16-bit values: tensor cores multiply V^T P^T with dimensions as M, heads as N
/// and tokens as K. A tensor core truncates its accumulator; the error is below the rounding of a 16-bit output.
template <typename T, typename Layout>
struct Sums {
  static constexpr int kFragments = Layout::kDims / 16;
  static constexpr int kCount = kFragments * 4;
  /// Weights are multiplied by kUnit, because small weights would underflow in fp16.
  static constexpr float kUnit = std::is_same_v<T, __half> ? 0x1p15f : 1.0f;
  float of[kCount] = {};  // of[2 i + j]: dimension 8 i + lane / 4 and head 2 (lane % 4) + j

  /// Adds a tile's values times their weights. All lanes call.
  template <typename Tile>
  __device__ void add(const Tile& tile, const TileScores& weights, Exchange<T>&) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      uint32_t high[2], low[2];  // weight = high + low, with twice the bits of T
#pragma unroll
      for (int k = 0; k < 2; ++k) split(weights.of + i + 2 * k, high[k], low[k]);
      const int row = lane % 8 * 4 + i / 2 + lane / 16, word = lane / 8 % 2;
#pragma unroll
      for (int fragment = 0; fragment < kFragments; ++fragment) {
        const uint4 values = load_transposed(tile.words[tile.index(row, 2 * fragment + word)]);
        float (&sums)[4] = *reinterpret_cast<float (*)[4]>(of + 4 * fragment);
        multiply_fragments<T>(sums, values, high[0], high[1], sums);
        multiply_fragments<T>(sums, values, low[0], low[1], sums);
      }
    }
  }

  /// Multiplies the sums of head h by the factor that lane 4 h passes. All lanes call.
  __device__ void multiply_by(float factor) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float head_factor = __shfl_sync(kAllLanes, factor, 4 * Products::head(j));
#pragma unroll
      for (int i = j; i < kCount; i += 2) of[i] *= head_factor;
    }
  }

  /// Writes the sums of the first `heads` heads and `dims` dimensions; those of head h begin at to + h stride. All
  /// lanes call.
  __device__ void write(float* to, int64_t stride, int heads, int dims) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (Products::head(j) >= heads) continue;
      float* of_head = to + Products::head(j) * stride;
#pragma unroll
      for (int i = j; i < kCount; i += 2) {
        if (const int d = i / 2 * 8 + lane / 4; d < dims) of_head[d] = of[i] * (1 / kUnit);
      }
    }
  }

 private:
  /// Splits two neighbouring weights into high and low parts of type T, two to a word.
  static __device__ void split(const float* weights, uint32_t& high, uint32_t& low) {
    alignas(4) T highs[2], lows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float weight = kUnit * weights[i];
      highs[i] = from_float<T>(weight);
      lows[i] = from_float<T>(weight - to_float(highs[i]));
    }
    high = *reinterpret_cast<const uint32_t*>(highs);
    low = *reinterpret_cast<const uint32_t*>(lows);
  }
};

/// A warp's sums for fp32 values, with the same methods. A lane has words lane % kAcross + 32 part of all heads. Where
/// a row has only kAcross = 16 words, half of the lanes take every other four tokens, and write adds the halves.
template <typename Layout>
struct Sums<float, Layout> {
  static constexpr int kWords = Layout::kDims / 4, kAcross = std::min(kWords, 32);
  static constexpr int kParts = kWords / kAcross;
  static constexpr int kCount = kParts * kTileHeads * 4;
  static constexpr float kUnit = 1;
  float of[kCount] = {};

  template <typename Tile>
  __device__ void add(const Tile& tile, const TileScores& weights, Exchange<float>& s_exchange) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) s_exchange.own(i) = weights.of[i];
    __syncwarp();
#pragma unroll 1
    for (int row = lane / kAcross * 4; row < kTileRows; row += 32 / kAcross * 4) {
      float values[kParts][4][4];
#pragma unroll
      for (int i = 0; i < kParts * 4; ++i) {
        unpack<float>(tile.words[tile.index(row + i % 4, lane % kAcross + i / 4 * 32)], values[i / 4][i % 4]);
      }
#pragma unroll
      for (int h = 0; h < kTileHeads; ++h) {
        const float4 four = *reinterpret_cast<const float4*>(s_exchange.of[h] + row);
        const float weights[] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < kParts * 16; ++i) {
          float& sum = of[(i / 16 * kTileHeads + h) * 4 + i % 4];
          sum = fmaf(weights[i / 4 % 4], values[i / 16][i / 4 % 4][i % 4], sum);
        }
      }
    }
  }

  __device__ void multiply_by(float factor) {
#pragma unroll
    for (int h = 0; h < kTileHeads; ++h) {
      const float head_factor = __shfl_sync(kAllLanes, factor, 4 * h);
#pragma unroll
      for (int i = 0; i < kParts * 4; ++i) of[(i / 4 * kTileHeads + h) * 4 + i % 4] *= head_factor;
    }
  }

  __device__ void write(float* to, int64_t stride, int heads, int dims) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float sum = of[i];
      if (kAcross < 32) sum += shuffle_xor(sum, kAcross % 32);
      const int h = i / 4 % kTileHeads, d = 4 * (lane + i / 4 / kTileHeads * 32) + i % 4;
      if (lane < kAcross && h < heads && d < dims) to[h * stride + d] = sum;
    }
  }
};

}  // namespace entmaxkv::cuda
