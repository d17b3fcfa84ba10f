// What the kernels of select_sketch leave for each other.
#pragma once

#include "tile.cuh"

namespace entmaxkv::cuda::sketch_selection {

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
__host__ __device__ inline int chunk_of(int seq_len) {
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

}  // namespace entmaxkv::cuda::sketch_selection
