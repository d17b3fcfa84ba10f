// How lists are cut into chunks, and how a block loads the keys and values of its chunks. The cuts depend only on the
// length of the list. So other rows and the size of the page table do not change a bit of the sums over chunks.
#pragma once

#include "../common/work_split.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

/// Tokens of a chunk, and the number of chunks of a list up to which chunks do not grow. Chunks are small enough that
/// all blocks end at nearly the same time, and large enough that the results of chunks are little memory traffic.
constexpr int kLeastChunk = 128, kMostChunk = 2048, kTargetChunks = 128;

/// Returns the number of tokens of a chunk of a list with `tokens` tokens.
__host__ __device__ constexpr int chunk_size(int tokens) {
  int size = kLeastChunk;
  while (size < kMostChunk && size * kTargetChunks < tokens) size *= 2;
  return size;
}

__host__ __device__ constexpr int chunks_of(int tokens) { return ceil_div(tokens, chunk_size(tokens)); }

/// Returns an upper bound of chunks_of(n) for n <= tokens.
constexpr int most_chunks(int tokens) {
  return std::max(std::min(ceil_div(tokens, kLeastChunk), kTargetChunks), ceil_div(tokens, kMostChunk));
}

/// Returns the number of units of a list. Units of kLeastChunk tokens are what WorkSplit divides; there is one list per
/// row and HeadGroup.
__device__ inline int units_of(const TokenList& list) { return ceil_div(list.tokens, kLeastChunk); }

/// One of a block's chunks, in shared memory. A chunk belongs to the block whose part of the work contains the chunk's
/// first unit.
struct ListChunk {
  int64_t row;
  HeadGroup group;
  TokenList list;
  int index;        // index of the list
  int nth;          // index of the chunk in the list
  int first, last;  // its tiles are first ... last - 1
  int size;         // units of a chunk of this list
  int end;          // the block's units of this list end here
  int left;         // the block's units of later lists

  __device__ ListChunk() {}  // for shared memory

  /// Returns whether this is a chunk, and not the end of the block's work.
  __device__ bool is_there() const { return first < last; }

  /// Sets this to the first position of the block's work (begin) or to the position after `before` (follow). Call
  /// settle afterwards.
  __device__ void begin(const SparseDecode& op, const WorkSplit& work) {
    index = work.list;
    left = work.items;
    enter(op, work.item);
  }
  __device__ void follow(const ListChunk& before) {
    *this = before;
    ++nth;
  }

  /// Moves on to the next position that holds a chunk, if there is one.
  __device__ void settle(const SparseDecode& op) {
    constexpr int kTiles = kLeastChunk / kTileRows;
#pragma unroll 1
    while (nth * size >= end && left > 0) {
      ++index;
      enter(op, 0);
    }
    first = nth * size * kTiles;
    last = nth * size < end ? min(first + size * kTiles, list.tiles()) : 0;
  }

 private:
  __device__ void enter(const SparseDecode& op, int unit) {
    const int groups = HeadGroup::per_row(op);
    row = index / groups;
    group = HeadGroup(op, index % groups);
    list = TokenList(op, row, group.kv_head);
    size = chunk_size(list.tokens) / kLeastChunk;
    end = min(units_of(list), unit + left);
    left -= end - unit;
    nth = ceil_div(unit, size);
  }
};

/// A window of a block's chunks in shared memory: from the chunk that is being added up to the chunks that are being
/// loaded.
struct Plan {
  static constexpr int kAhead = 4;
  ListChunk chunks[2 * kAhead];

  __device__ ListChunk& operator[](int n) { return chunks[n % (2 * kAhead)]; }

  /// Plans the nth chunk. One thread calls, for n = 0, 1, ... in turn.
  __device__ void add(const SparseDecode& op, const WorkSplit& work, int n) {
    if (n == 0) {
      (*this)[0].begin(op, work);
    } else {
      (*this)[n].follow((*this)[n - 1]);
    }
    (*this)[n].settle(op);
  }
};

/// Loads a warp's tiles into its slots: the keys of a tile, its values, the keys of the next tile, ... In each chunk
/// all warps of a block have the same number of tiles; a warp's last tile may be empty.
template <typename Slots>
class Loader {
 public:
  __device__ Loader(const SparseDecode& op, Plan& s_plan) : op_(op), s_plan_(s_plan) {}

  /// Starts at the first chunk, which must be planned. All lanes call.
  __device__ void begin() {
    tile_ = s_plan_[0].first + static_cast<int>(threadIdx.x / 32);
    look_up();
  }

  /// Starts to copy the next 32 rows into a slot. All lanes call.
  template <typename Slot>
  __device__ void load(Slot& slot) {
    const ListChunk& chunk = s_plan_[chunk_];
    if (tile_ < chunk.last) {
      const Rows& rows = values_ ? op_.v_pages : op_.k_pages;
      slot.load(chunk.list.row<typename Slots::T>(rows, chunk.group.kv_head, page_, in_page_), op_.head_dim);
    }
    commit_copies();
    if (values_ && chunk.is_there()) {
      tile_ += Slots::kWarps;
      if (tile_ - static_cast<int>(threadIdx.x / 32) >= chunk.last) {
        tile_ = s_plan_[++chunk_].first + static_cast<int>(threadIdx.x / 32);
      }
      look_up();
    }
    values_ = !values_;
  }

 private:
  /// Reads from the page table where this lane's token of the tile is. A lane behind the end of the list takes the last
  /// token.
  __device__ void look_up() {
    const ListChunk& chunk = s_plan_[chunk_];
    if (tile_ >= chunk.last) return;
    const int place = min(tile_ * kTileRows + static_cast<int>(threadIdx.x % 32), chunk.list.tokens - 1);
    page_ = chunk.list.page(place);
    in_page_ = chunk.list.slot(place);
  }

  const SparseDecode& op_;
  Plan& s_plan_;
  int chunk_ = 0, tile_, page_, in_page_;
  bool values_ = false;
};

}  // namespace entmaxkv::cuda
