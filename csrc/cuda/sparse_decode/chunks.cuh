// How lists are cut into chunks, and how a warp takes chunks and loads their keys and values. The cuts depend only on
// the length of the list. So other rows and the size of the page table do not change a bit of the sums over chunks.
#pragma once

#include "../common/reduce.cuh"
#include "token_list.cuh"
#include "value_sums.cuh"

namespace entmaxkv::cuda {

// Chunks are small enough that all warps get some and end at nearly the same time, and large enough that the results of
// chunks are little memory traffic.
constexpr int kLeastChunk = 128;   // tokens of a chunk, at least
constexpr int kMostChunk = 1024;   // tokens of a chunk, at most
constexpr int kTargetChunks = 64;  // chunks grow only where a list would have more of them

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

/// A stretch of a list. There is one list per row and HeadGroup.
struct Chunk {
  TokenList list;
  HeadGroup group;
  int64_t row;
  int nth;          // index of the chunk in the list
  int first, last;  // its tiles are first ... last - 1

  __device__ Chunk() {}  // for shared memory

  /// Returns whether this is a chunk, and not the end of the work.
  __device__ bool is_there() const { return first < last; }
};

/// The chunks of all lists, numbered in sequence. First come the nth chunks of all lists of a row, then the next ones:
/// warps that run at the same time then read neighbouring memory, which is faster. Not every number has a chunk, since
/// the lists of a row may differ in length.
class Work {
 public:
  __device__ explicit Work(const SparseDecode& op) : op_(op), lists_(HeadGroup::per_row(op)) {}

  /// Returns whether find has gone beyond the last chunk.
  __device__ bool is_over() const { return begin_ >= op_.batch; }

  /// Returns the chunk with this number, without tiles if there is none. Numbers of successive calls must ascend. All
  /// lanes of a warp call.
  __device__ Chunk find(int number) {
    Chunk chunk;
    chunk.first = chunk.last = 0;
#pragma unroll 1
    for (; begin_ < op_.batch; begin_ += 32) {  // each lane looks at a row
      const int row = begin_ + static_cast<int>(threadIdx.x % 32);
      const int own = row < op_.batch ? lists_ * most_chunks_of(row) : 0, upto = before_ + sum_upto(own);
      const uint32_t beyond = __ballot_sync(kAllLanes, number < upto);
      if (beyond) {
        const int source = __ffs(beyond) - 1, in_row = number - __shfl_sync(kAllLanes, upto - own, source);
        chunk.row = begin_ + source;
        chunk.group = HeadGroup(op_, in_row % lists_);
        chunk.list = TokenList(op_, chunk.row, chunk.group.kv_head);
        chunk.nth = in_row / lists_;
        const int tiles = chunk_size(chunk.list.tokens) / kTileRows;
        chunk.first = chunk.nth * tiles;
        chunk.last = min(chunk.first + tiles, chunk.list.tiles());
        break;
      }
      before_ = __shfl_sync(kAllLanes, upto, 31);
    }
    return chunk;
  }

 private:
  __device__ int most_chunks_of(int row) const {
    int most = 0;
#pragma unroll 1
    for (int kv_head = 0; kv_head < (op_.selection ? op_.kv_heads : 1); ++kv_head) {
      most = max(most, chunks_of(TokenList(op_, row, kv_head).tokens));
    }
    return most;
  }

  const SparseDecode& op_;
  int lists_;                   // of a row
  int begin_ = 0, before_ = 0;  // the first row that successive calls look at, and the numbers of the rows before it
};

/// What a warp of `attend` has in shared memory.
template <typename TheT, typename TheLayout>
struct WarpMemory {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kSlots = std::clamp((16 << 10) / int{sizeof(Slot<T, Layout>)}, 1, 4);
  static constexpr int kAhead = 4;  // more than the chunks that kSlots tiles can lie in

  Slot<T, Layout> slots[kSlots];
  Queries<T, Layout> q;
  [[no_unique_address]] Exchange<T> exchange;
  Chunk chunks[kAhead];  // from the chunk that is being added up to the chunk that is being loaded

  __device__ Chunk& chunk(int n) { return chunks[n % kAhead]; }
};

/// The most warps of a block, of which a multiprocessor runs one: as many as an H200 has shared memory and registers
/// for.
template <typename Memory>
constexpr int kMostWarps =
    std::min(Memory::Layout::kRounds == 8 ? 8 : 12, static_cast<int>((227 << 10) / sizeof(Memory)));

/// Takes a warp's chunks, and loads their tiles into its slots: the keys of a tile, its values, the keys of the next
/// tile, ...
template <typename Memory>
class Loader {
 public:
  using T = typename Memory::T;
  using Layout = typename Memory::Layout;

  /// Takes the first chunk. `taken` counts the numbers that all warps have taken beyond their first. If it is null,
  /// each warp takes every nth number. `policy` is that of read_once. All lanes call.
  __device__ Loader(const SparseDecode& op, uint32_t* taken, Memory& s_warp, uint64_t policy)
      : op_(op), s_warp_(s_warp), work_(op), taken_(taken), policy_(policy) {
    next_ = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32);
    take();
  }

  /// Starts to copy the next 32 rows into a slot. All lanes call.
  __device__ void load(Slot<T, Layout>& slot) {
    constexpr int kAtOnce = Layout::kVectors && Layout::kDims * sizeof(T) <= 512 ? 8 : 1;
    const Chunk& chunk = s_warp_.chunk(chunk_);
    if (!values_ && tile_ + 1 == chunk.last) ask();
    if (tile_ < chunk.last) {
      const Rows& rows = values_ ? op_.v_pages : op_.k_pages;
      slot.template load<kAtOnce>(chunk.list.template row<T>(rows, chunk.group.kv_head, page_, in_page_), op_.head_dim,
                                  policy_);
    }
    commit_copies();
    if (values_ && chunk.is_there()) {
      if (++tile_ == chunk.last) {
        ++chunk_;
        take();
      } else {
        look_up();
      }
    }
    values_ = !values_;
  }

 private:
  /// Asks for the next number. To ask later would mean to wait for the answer; to ask earlier would give the last
  /// chunks to warps that are not the first to end.
  __device__ void ask() {
    const int warps = static_cast<int>(gridDim.x * blockDim.x / 32);
    if (!taken_) {
      next_ += warps;
    } else if (threadIdx.x % 32 == 0) {
      next_ = warps + static_cast<int>(atomicAdd(taken_, 1u));
    }
  }

  /// Goes on to the chunk whose number the warp has asked for, or to a later one if there is none.
  __device__ void take() {
    Chunk chunk;
#pragma unroll 1
    for (;; ask()) {
      chunk = work_.find(__shfl_sync(kAllLanes, next_, 0));
      if (chunk.is_there() || work_.is_over()) break;
    }
    if (threadIdx.x % 32 == 0) s_warp_.chunk(chunk_) = chunk;
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
  uint64_t policy_;
  int next_;
  int chunk_ = 0, tile_, page_, in_page_;
  bool values_ = false;
};

}  // namespace entmaxkv::cuda
