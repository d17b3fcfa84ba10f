// Lists cut into chunks, and how a block goes through the keys and values of its chunks. The cuts depend on the length
// of a list alone, so that neither other rows nor the room in its table change a bit of what is added up chunk by
// chunk.
#pragma once

#include "../common/work_split.cuh"
#include "token_list.cuh"

namespace entmaxkv::cuda {

/// Small enough that blocks end together, large enough that results of chunks are little to write and read.
constexpr int kLeastChunk = 128, kMostChunk = 2048, kWantedChunks = 128;

/// Tokens of a chunk of a list.
__host__ __device__ constexpr int chunk_size(int tokens) {
  int size = kLeastChunk;
  while (size < kMostChunk && size * kWantedChunks < tokens) size *= 2;
  return size;
}

__host__ __device__ constexpr int chunks_of(int tokens) { return ceil_div(tokens, chunk_size(tokens)); }

/// Of any list with at most that many tokens.
constexpr int most_chunks(int tokens) {
  return std::max(std::min(ceil_div(tokens, kLeastChunk), kWantedChunks), ceil_div(tokens, kMostChunk));
}

/// Lists, one per row and group of heads, are divided in units of kLeastChunk.
__device__ inline int units_of(const TokenList& list) { return ceil_div(list.tokens, kLeastChunk); }

/// One of a block's chunks: of all those that begin in its work. In shared memory.
struct ListChunk {
  int64_t row;
  HeadGroup group;
  TokenList list;
  int index;        // of the list
  int nth;          // chunk of the list
  int first, last;  // its tiles
  int size;         // units
  int end;          // of the share in this list, in units
  int left;         // of the share in later lists

  __device__ ListChunk() {}

  __device__ bool is_there() const { return first < last; }

  /// Becomes the first one, or the one behind another; then call settle.
  __device__ void begin(const SparseDecode& op, const WorkSplit& work) {
    index = work.list;
    left = work.items;
    enter(op, work.item);
  }
  __device__ void follow(const ListChunk& before) {
    *this = before;
    ++nth;
  }

  /// Goes on to where a chunk is, if there is one.
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

/// The next chunks of a block, from the one that it adds up on as far as loading may be ahead.
struct Plan {
  static constexpr int kAhead = 4;
  ListChunk chunks[2 * kAhead];

  __device__ ListChunk& operator[](int n) { return chunks[n % (2 * kAhead)]; }

  /// By one thread.
  __device__ void add(const SparseDecode& op, const WorkSplit& work, int n) {
    if (n == 0) {
      (*this)[0].begin(op, work);
    } else {
      (*this)[n].follow((*this)[n - 1]);
    }
    (*this)[n].settle(op);
  }
};

/// The keys and values of a warp's tiles, in turn, on their way to its slots. In each chunk, all warps of a block have
/// as many tiles: some are empty.
template <typename Slots>
class Loader {
 public:
  __device__ Loader(const SparseDecode& op, Plan& s_plan) : op_(op), s_plan_(s_plan) {}

  /// Once the first chunks are planned. All lanes call.
  __device__ void begin() {
    tile_ = s_plan_[0].first + static_cast<int>(threadIdx.x / 32);
    look_up();
  }

  /// Begins to copy the next rows. All lanes call.
  template <typename Slot>
  __device__ void load(Slot& slot) {
    const ListChunk& chunk = s_plan_[chunk_];
    if (tile_ < chunk.last) {
      const Rows& pages = values_ ? op_.v_pages : op_.k_pages;
      slot.load(pages.at<typename Slots::T>(page_, chunk.group.kv_head, in_page_), op_.head_dim);
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
  /// Finds in memory this lane's token. Behind the end of the list it is the last one.
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
