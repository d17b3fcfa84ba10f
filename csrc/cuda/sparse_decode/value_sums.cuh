// Weighted sums of the values of a warp's tiles, for up to 8 query heads of a group.
//   out[h, d] = sum_i weight[h, i] v[i, d]
#pragma once

#include "../common/matrix_product.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda {

/// The scores of a warp's tile in shared memory, which the warp then replaces by weights. kTileRows + 4 puts
/// neighbouring heads into different banks.
struct TileScores {
  alignas(16) float of[kTileHeads][kTileRows + 4];

  /// Stores the lanes' scores. All lanes call; all may read the result.
  __device__ void set(const Products& scores) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      *reinterpret_cast<float4*>(&of[Products::head(j)][Products::row(0)]) = {scores.of[0][j], scores.of[1][j],
                                                                              scores.of[2][j], scores.of[3][j]};
    }
    __syncwarp();
  }
};

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
  __device__ void add(const Slot<T, Layout>& slot, const TileScores& s_weights) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int first = 0; first < kTileRows; first += 16) {
      uint32_t high[2], low[2];  // weight = high + low, with twice the bits of T
#pragma unroll
      for (int i = 0; i < 2; ++i) split(s_weights.of[lane / 4] + first + lane % 4 * 2 + 8 * i, high[i], low[i]);
      const int row = first + lane % 8 + lane / 16 * 8, word = lane / 8 % 2;
#pragma unroll
      for (int fragment = 0; fragment < kFragments; ++fragment) {
        const uint4 values = load_transposed(slot.words[slot.index(row, 2 * fragment ^ word)]);
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

  /// Calls body(head, dimension, sum) for this lane's sums. All lanes call.
  template <typename Body>
  __device__ void visit(Body body) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      body(Products::head(i % 2), i / 2 * 8 + static_cast<int>(threadIdx.x % 32) / 4, of[i]);
    }
  }

 private:
  /// Splits two neighbouring weights into high and low parts of type T, two to a word.
  static __device__ void split(const float* s_weights, uint32_t& high, uint32_t& low) {
    alignas(4) T highs[2], lows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float weight = kUnit * s_weights[i];
      highs[i] = from_float<T>(weight);
      lows[i] = from_float<T>(weight - to_float(highs[i]));
    }
    high = *reinterpret_cast<const uint32_t*>(highs);
    low = *reinterpret_cast<const uint32_t*>(lows);
  }
};

/// A warp's sums for fp32 values, with the same methods. A lane has words lane % kAcross + 32 part of all heads. Where
/// a row has only kAcross = 16 words, half of the lanes take every other four tokens, and visit adds the halves.
template <typename Layout>
struct Sums<float, Layout> {
  static constexpr int kWords = Slot<float, Layout>::kWords, kAcross = std::min(kWords, 32);
  static constexpr int kParts = kWords / kAcross;
  static constexpr int kCount = kParts * kTileHeads * 4;
  static constexpr float kUnit = 1;
  float of[kCount] = {};

  __device__ void add(const Slot<float, Layout>& slot, const TileScores& s_weights) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = lane / kAcross * 4; row < kTileRows; row += 32 / kAcross * 4) {
      float values[kParts][4][4];
#pragma unroll
      for (int i = 0; i < kParts * 4; ++i) {
        unpack<float>(slot.words[slot.index(row + i % 4, lane % kAcross + i / 4 * 32)], values[i / 4][i % 4]);
      }
#pragma unroll
      for (int h = 0; h < kTileHeads; ++h) {
        const float4 four = *reinterpret_cast<const float4*>(s_weights.of[h] + row);
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

  template <typename Body>
  __device__ void visit(Body body) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float sum = of[i];
      if (kAcross < 32) sum += shuffle_xor(sum, kAcross % 32);
      if (lane < kAcross) body(i / 4 % kTileHeads, 4 * (lane + i / 4 / kTileHeads * 32) + i % 4, sum);
    }
  }
};

}  // namespace entmaxkv::cuda
