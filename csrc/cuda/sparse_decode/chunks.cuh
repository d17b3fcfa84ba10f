// How lists are cut into chunks, and how a warp takes chunks and loads their keys and values. The cuts depend only on
// the length of the list. So other rows and the size of the page table do not change a bit of the sums over chunks.
#pragma once

#include "../common/reduce.cuh"
#include "token_list.cuh"
#include "value_sums.cuh"

namespace entmaxkv::cuda {

/// Tokens of a chunk, and the number of chunks of a list up to which chunks do not grow. Chunks are small enough that
/// all warps get some and end at nearly the same time, and large enough that the results of chunks are little memory
/// traffic.
constexpr int kLeastChunk = 128, kMostChunk = 512, kTargetChunks = 128;

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

/// The results of kFold successive chunks of a list are added to each other before they are added to others. A warp
/// that takes all of them writes only their sum, with the same bits.
constexpr int kFold = 4;

/// A stretch of a list. There is one list per row and HeadGroup.
struct Chunk {
  TokenList list;
  HeadGroup group;
  int64_t row;
  int index;        // index of the list
  int nth;          // index of the chunk in the list
  int begin, end;   // the warp takes chunks begin ... end - 1 of the list
  int first, last;  // its tiles are first ... last - 1

  /// Returns whether this is a chunk, and not the end of the work.
  __device__ bool is_there() const { return first < last; }

  /// Sets the tiles to those of the nth chunk.
  __device__ void set_tiles() {
    const int tiles = chunk_size(list.tokens) / kTileRows;
    first = nth * tiles;
    last = min(first + tiles, list.tiles());
  }
};

/// Returns the value that lane `source` passes, a struct of 4-byte words. All lanes call.
template <typename Value>
__device__ Value shuffle(Value value, int source) {
  constexpr int kWords = sizeof(Value) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(Value));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_sync(kAllLanes, word, source);
  memcpy(&value, words, sizeof(Value));
  return value;
}

/// What warps take at once, numbered in sequence: kFold chunks of the first `folded` lists, single chunks of the
/// others.
class Work {
 public:
  __device__ Work(const SparseDecode& op, int folded) : op_(op), groups_(HeadGroup::per_row(op)), folded_(folded) {}

  /// Returns the first chunk of the part with this number, or one without tiles if there are fewer parts. Numbers of
  /// successive calls must ascend. All lanes of a warp call.
  __device__ Chunk find(int number) {
    Chunk chunk;
    chunk.nth = chunk.end = chunk.first = chunk.last = 0;
    const int lists = op_.batch * groups_;
#pragma unroll 1
    for (; begin_ < lists; begin_ += 32) {  // each lane looks at a list
      const int index = begin_ + static_cast<int>(threadIdx.x % 32);
      TokenList list;
      list.tokens = 0;
      if (index < lists) list = TokenList(op_, index / groups_, HeadGroup(op_, index % groups_).kv_head);
      const int each = index < folded_ ? kFold : 1;
      const int parts = ceil_div(chunks_of(list.tokens), each), upto = before_ + sum_upto(parts);
      const uint32_t beyond = __ballot_sync(kAllLanes, number < upto);
      if (beyond) {
        const int source = __ffs(beyond) - 1;
        chunk.list = shuffle(list, source);
        chunk.index = begin_ + source;
        chunk.row = chunk.index / groups_;
        chunk.group = HeadGroup(op_, chunk.index % groups_);
        const int taken = chunk.index < folded_ ? kFold : 1;
        chunk.begin = chunk.nth = (number - __shfl_sync(kAllLanes, upto - parts, source)) * taken;
        chunk.end = min(chunk.begin + taken, chunks_of(chunk.list.tokens));
        chunk.set_tiles();
        break;
      }
      before_ = __shfl_sync(kAllLanes, upto, 31);
    }
    return chunk;
  }

 private:
  const SparseDecode& op_;
  int groups_, folded_;
  int begin_ = 0, before_ = 0;  // the first list that successive calls look at, and the parts of the lists before it
};

/// What a warp of `attend` has in shared memory.
template <typename TheT, typename TheLayout>
struct WarpMemory {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kSlotBytes = sizeof(Slot<T, Layout>);
  static constexpr int kSlots = std::clamp((24 << 10) / kSlotBytes, 1, 4);
  static constexpr int kAhead = 4;  // more than the chunks that kSlots tiles can lie in

  Slot<T, Layout> slots[kSlots];
  Queries<T, Layout> q;
  [[no_unique_address]] Exchange<T> exchange;
  Chunk chunks[kAhead];  // from the chunk that is being added up to the chunk that is being loaded

  __device__ Chunk& chunk(int n) { return chunks[n % kAhead]; }
};

/// The most warps of a block, of which a multiprocessor runs one. Shared memory for more tiles of fewer warps is faster
/// than the opposite, because a warp ends its chunk earlier.
template <typename Memory>
constexpr int kMostWarps = std::min(8, static_cast<int>((227 << 10) / sizeof(Memory)));

/// Starts to copy 32 rows. Lane i passes the address of row i. All lanes call. As Slot::load, but with fewer
/// instructions, and longer.
template <typename T, typename Layout>
__device__ void load_rows(Slot<T, Layout>& slot, const T* row, int head_dim) {
  constexpr int kWords = Slot<T, Layout>::kWords, kCount = 16 / sizeof(T);
  if constexpr (!Layout::kVectors || kWords > 32) {
    slot.load(row, head_dim);
  } else {
    constexpr int kAtOnce = 32 / kWords;
    const int lane = threadIdx.x % 32, first = lane / kWords, nth = lane % kWords;
    const auto address = reinterpret_cast<unsigned long long>(row);
    const bool valid = nth * kCount < head_dim;
#pragma unroll 8
    for (int i = 0; i < kWords; ++i) {
      const int begin = i * kAtOnce;  // the bits of begin and first do not overlap
      const T* its_row = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, begin + first));
      copy_async(slot.words[begin * kWords + first * kWords + (nth ^ first ^ begin & 7)], its_row + nth * kCount,
                 valid);
    }
  }
}

/// Takes a warp's chunks, and loads their tiles into its slots: the keys of a tile, its values, the keys of the next
/// tile, ...
template <typename Memory>
class Loader {
 public:
  /// Takes the first chunk. `taken` counts the parts of the work that all warps have taken beyond their first. If it is
  /// null, each warp takes every nth part. All lanes call.
  __device__ Loader(const SparseDecode& op, int folded, uint32_t* taken, Memory& s_warp)
      : op_(op), s_warp_(s_warp), work_(op, folded), taken_(taken) {
    next_ = static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x);
    enter(work_.find(next_));
  }

  /// Starts to copy the next 32 rows into a slot. All lanes call.
  template <typename Slot>
  __device__ void load(Slot& slot) {
    const Chunk& chunk = s_warp_.chunk(chunk_);
    if (!values_ && tile_ + 1 == chunk.last && chunk.nth + 1 == chunk.end) ask();
    if (tile_ < chunk.last) {
      const Rows& rows = values_ ? op_.v_pages : op_.k_pages;
      load_rows(slot, chunk.list.template row<typename Memory::T>(rows, chunk.group.kv_head, page_, in_page_),
                op_.head_dim);
    }
    commit_copies();
    if (values_ && chunk.is_there()) {
      if (++tile_ == chunk.last) {
        take();
      } else {
        look_up();
      }
    }
    values_ = !values_;
  }

 private:
  /// Asks for the number of the next part. To ask later than this would wait for the answer; to ask earlier would give
  /// the last parts to warps that are not the first to end.
  __device__ void ask() {
    const int warps = static_cast<int>(gridDim.x * blockDim.x / 32);
    if (!taken_) {
      next_ += warps;
    } else if (threadIdx.x % 32 == 0) {
      next_ = warps + static_cast<int>(atomicAdd(taken_, 1u));
    }
  }

  /// Goes on to the next chunk.
  __device__ void take() {
    Chunk chunk = s_warp_.chunk(chunk_++);
    if (++chunk.nth < chunk.end) {
      chunk.set_tiles();
      enter(chunk);
    } else {
      enter(work_.find(__shfl_sync(kAllLanes, next_, 0)));
    }
  }

  __device__ void enter(const Chunk& chunk) {
    s_warp_.chunk(chunk_) = chunk;
    __syncwarp();
    tile_ = chunk.first;
    if (chunk.is_there()) look_up();
  }

  /// Reads from the page table where this lane's token of the tile is. A lane behind the end of the list takes the last
  /// token.
  __device__ void look_up() {
    const TokenList& list = s_warp_.chunk(chunk_).list;
    const int place = min(tile_ * kTileRows + static_cast<int>(threadIdx.x % 32), list.tokens - 1);
    page_ = list.page(place);
    in_page_ = list.slot(place);
  }

  const SparseDecode& op_;
  Memory& s_warp_;
  Work work_;
  uint32_t* taken_;
  int next_;
  int chunk_ = 0, tile_, page_, in_page_;
  bool values_ = false;
};

}  // namespace entmaxkv::cuda
