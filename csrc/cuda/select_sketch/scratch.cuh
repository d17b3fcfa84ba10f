// Sizes that the kernels of select_sketch share, and the intermediate results that they pass on in global memory.
#pragma once

#include "tile.cuh"

namespace entmaxkv::cuda::sketch_selection {

using namespace sketch_tile;

template <int kWords>
constexpr int kBlocks = kWords <= 2 ? 4 : 6 - kWords;  // blocks that share a multiprocessor

/// Blocks per multiprocessor that the compiler must leave registers for. Code for GPUs other than Hopper needs a few
/// more registers.
template <int kWords>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kOccupancy = kBlocks<kWords> - 1;
#else
constexpr int kOccupancy = kBlocks<kWords>;
#endif
constexpr int kMostChunks = 512;  // most chunks of a row
constexpr int kClasses = 8;       // token t is in class t / 4 % kClasses
constexpr int kSegment = 256;     // tokens of a segment
constexpr int kBins = 256;        // one for each merit; the last is not used

/// Returns how many tokens a chunk of a row has, a multiple of kTokens.
__host__ __device__ inline int chunk_of(int seq_len) {
  return max(1, ceil_div(ceil_div(seq_len, kTokens), kMostChunks)) * kTokens;
}

/// The token with the highest upper bound so far, the first one of several.
struct Best {
  float upper = kNothing;
  int token = -1;

  /// Replaces this by `other` if that is better.
  __device__ void take(const Best& other) {
    if (other.upper > upper || (other.upper == upper && other.token >= 0 && other.token < token)) *this = other;
  }
};

/// Intermediate results in global memory.
struct Scratch {
  int capacity;               // tokens of the longest row, in whole segments
  __half* uppers;             // [batch, q_heads, capacity] upper bounds of scores from plane 0, rounded up
  Best* bests;                // [batch, q_heads, kClasses, chunks] best token of each class of each chunk
  float* floors;              // [batch, q_heads] floors
  uint32_t* candidates;       // [batch, kv_heads, capacity / 32] bit i of word w: whether token 32 w + i is a candidate
  int32_t* candidate_counts;  // [batch, kv_heads, segments] candidates of each segment
  uint8_t* merits;            // [batch, kv_heads, capacity] merits of candidates; null if there is no cap
  int32_t* at_merit;          // [batch, kv_heads, kBins] candidates of each merit; null if there is no cap

  explicit Scratch(const SelectSketch& op) : capacity(ceil_div(op.max_pages * op.page_size, kSegment) * kSegment) {}

  __host__ __device__ int segments() const { return capacity / kSegment; }
  __host__ __device__ int chunks() const { return min(capacity / kTokens, kMostChunks); }

  /// Returns the best tokens [chunks] of a class, for row_head = row * q_heads + head.
  __device__ Best* bests_of(int64_t row_head, int its_class) const {
    return bests + (row_head * kClasses + its_class) * chunks();
  }

  /// Places the arrays one after the other from `memory` on. Returns how many bytes they take.
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
    take(candidates, lists * capacity / 32);
    take(candidate_counts, lists * segments());
    at_merit = nullptr;
    merits = nullptr;
    if (op.selection.max_selected < op.max_pages * op.page_size) {
      take(at_merit, lists * kBins);
      take(merits, lists * capacity);
    }
    return next - static_cast<char*>(memory);
  }
};

}  // namespace entmaxkv::cuda::sketch_selection
