// What the kernels that decode long lists share: intermediate results in global memory.
#pragma once

#include "../../entmax.h"
#include "near_tokens.cuh"
#include "values.cuh"

namespace entmaxkv::cuda {

struct Scratch {
  Entmax<double> entmax;  // of an alpha that all heads share: found on the host, since it takes divisions in double

  int capacity;     // tokens of the longest list, in whole tiles
  int chunks;       // most chunks of a head's tokens with weight (values.cuh)
  int dims;         // head_dim rounded up to whole float4
  bool is_long;     // the keys are a long stream (read_once)
  bool q_vectors;   // queries can be read 16 bytes at a time
  int batch_tiles;  // tiles of a batch of `solve` (ListScores)
  // Written by `scan`:
  float* maxima;  // [batch, q_heads, capacity / 32] best score of each tile
  float* scores;  // [batch, q_heads, capacity] by place in the list
  // Written by `solve`:
  float* listed_weights;  // [batch, q_heads, capacity] of the tokens with weight
  uint32_t* listed_rows;  // [batch, q_heads, capacity] their rows in the pool
  int32_t* supports;      // [batch, q_heads] number of listed tokens; 0 if the output has been written
  uint32_t* arrived;      // [batch, q_heads] chunks whose values are summed; starts at 0
  // Written by `add_values`:
  float* sums;  // [batch, q_heads, chunks, dims]

  explicit Scratch(const SparseDecode& op)
      : entmax(op.alpha.value),
        capacity(capacity_of(op)),
        chunks(std::min(ceil_div(capacity, kLeastValues), kMostValueChunks)),
        dims(ceil_div(op.head_dim, 4) * 4),
        is_long(key_bytes(op) >= kLongStream),
        q_vectors(in_vectors(op.q, op.dtype, op.head_dim)),
        batch_tiles(ListScores::batch_tiles()) {}

  __device__ Entmax<double> entmax_of(const Alpha& alpha, int head) const {
    return alpha.per_head ? Entmax<double>(alpha.of(head)) : entmax;
  }

  __host__ __device__ int tiles() const { return capacity / kTileRows; }

  /// A head's tokens with weight, in the order of the list: weights [supports], and their rows in the pool [supports],
  /// as TokenList::pool_row.
  __device__ float* weights(int64_t head) const { return listed_weights + head * capacity; }
  __device__ uint32_t* rows(int64_t head) const { return listed_rows + head * capacity; }

  /// Places the arrays one after the other from `memory` on. Returns how many bytes they take.
  int64_t place(const SparseDecode& op, void* memory) {
    const int64_t heads = int64_t{op.batch} * op.q_heads;
    int64_t bytes = 0;
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(memory) + bytes);
      bytes += (heads * count * 4 + 15) / 16 * 16;
    };
    take(maxima, tiles());
    take(scores, capacity);
    take(listed_weights, capacity);
    take(listed_rows, capacity);
    take(supports, 1);
    take(arrived, 1);
    take(sums, int64_t{chunks} * dims);
    return bytes;
  }
};

}  // namespace entmaxkv::cuda
