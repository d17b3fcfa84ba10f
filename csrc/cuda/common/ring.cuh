// Pipelined loads of tiles of 32 rows from global memory into a ring of slots in shared memory, one ring per warp.
#pragma once

#include <algorithm>
#include <type_traits>

#include "copy.cuh"
#include "element.cuh"
#include "launch.cuh"
#include "sizes.cuh"

namespace entmaxkv::cuda {

constexpr int kTileRows = 32;

/// How a slot holds rows: kRounds x 32 dimensions, padded with zeros. kVectors: rows are copied 16 bytes at a time,
/// else one element at a time.
template <int kRoundsOf32, bool kInVectors>
struct Layout {
  static constexpr int kRounds = kRoundsOf32;
  static constexpr int kDims = 32 * kRounds;
  static constexpr bool kVectors = kInVectors;
};

/// Returns whether every row is aligned so that it can be read 16 bytes at a time.
inline bool in_vectors(const Rows& rows, Dtype dtype, int head_dim) {
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  int64_t all = reinterpret_cast<int64_t>(rows.data) | head_dim * bytes;
  for (const int64_t stride : rows.stride) all |= stride * bytes;
  return all % 16 == 0;
}

/// Calls body with the smallest Layout that fits head_dim. All unaligned rows use the same Layout.
template <typename Body>
void dispatch_layout(int head_dim, bool vectors, Body body) {
  if (!vectors) return body(Layout<8, false>{});
  if (head_dim <= 64) return body(Layout<2, true>{});
  if (head_dim <= 128) return body(Layout<4, true>{});
  return body(Layout<8, true>{});
}

/// Returns 16 bytes of a row from dimension d on, with zeros from head_dim on. kVectors: in one load.
template <bool kVectors, typename T>
__device__ uint4 load_word(const T* row, int d, int head_dim) {
  constexpr int kCount = 16 / sizeof(T);
  if (d >= head_dim) return {0, 0, 0, 0};
  if constexpr (kVectors) {
    return __ldg(reinterpret_cast<const uint4*>(row + d));
  } else {
    alignas(16) T values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = d + i < head_dim ? row[d + i] : from_float<T>(0);
    return *reinterpret_cast<const uint4*>(values);
  }
}

/// Converts the elements of a 16-byte word to floats.
template <typename T>
__device__ void unpack(const uint4& word, float (&values)[16 / sizeof(T)]) {
  const T* from = reinterpret_cast<const T*>(&word);
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) values[i] = to_float(from[i]);
}

/// Returns an order of 0 ... 7 in which 0 and 1, 2 and 3, ... are 4 apart.
__device__ inline int spread(int n) { return n / 2 + n % 2 * 4; }

/// The rows of a tile in shared memory, copied by the lanes of a warp.
template <typename TheT, typename TheLayout>
struct Slot {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kWords = Layout::kDims * static_cast<int>(sizeof(T)) / 16;  // words per row
  static constexpr int kLanePart = kWords / 4;  // words per row that one lane multiplies
  uint4 words[kTileRows * kWords];

  /// Returns the index in `words` of a row's word. Rows 4 apart are read together, four words of each of two rows or
  /// one word of each of eight. The XOR puts these words into different banks.
  static __device__ int index(int row, int word) { return row * kWords + (word ^ spread(row / 4)); }

  /// Returns the nth word of a row that this lane multiplies.
  __device__ const uint4& word(int row, int nth) const {
    return words[index(row, 4 * nth + static_cast<int>(threadIdx.x % 4))];
  }

  /// Starts to copy 32 rows. Lane i passes the address of row i; `policy` is that of read_once. kAtOnce: how often the
  /// loop is unrolled; short code suits small kernels, which wait for instructions. All lanes call.
  template <int kAtOnce = 4>
  __device__ void load(const T* row, int head_dim, uint64_t policy) {
    constexpr int kCount = 16 / sizeof(T);
    const auto address = reinterpret_cast<unsigned long long>(row);
#pragma unroll kAtOnce
    for (int i = 0; i < kWords; ++i) {
      const int at = i * 32 + static_cast<int>(threadIdx.x % 32), from = at / kWords, nth = at % kWords;
      const T* its_row = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, from));
      uint4& to = words[index(from, nth)];
      if constexpr (Layout::kVectors) {
        stream_async(to, its_row + nth * kCount, nth * kCount < head_dim, policy);
      } else {
        to = load_word<false>(its_row, nth * kCount, head_dim);
      }
    }
  }
};

constexpr int kRingBytes = 64 << 10;  // most bytes that the rings of a block take

/// The rings of slots in a block's dynamic shared memory: one for each of its first kWarps warps.
template <typename TheT, typename TheLayout, int kMostWarps>
struct Ring {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kSlotBytes = sizeof(Slot<T, Layout>);
  static constexpr int kWarps = std::min(kMostWarps, kRingBytes / kSlotBytes);
  static constexpr int kSlots = std::min(4, kRingBytes / kSlotBytes / kWarps);
  static constexpr int kBytes = kWarps * kSlots * kSlotBytes;

  /// Returns the nth slot of this warp.
  static __device__ Slot<T, Layout>& slot(int nth) {
    return reinterpret_cast<Slot<T, Layout>*>(dynamic_shared())[threadIdx.x / 32 * kSlots + nth];
  }

  // What a TileStream calls.
  static constexpr bool kWholeRuns = false;
  static __device__ void begin() {}
  static __device__ void load(int nth, const T* row, int head_dim, uint64_t policy) {
    slot(nth).load(row, head_dim, policy);
  }
  static __device__ void end_load() { commit_copies(); }
  static __device__ void wait(int, int) {
    wait_for_copies<kSlots - 1>();
    __syncwarp();  // the other lanes' copies have arrived, too
  }
  static __device__ void end() {}
};

/// The ring of blocks that only stream tiles, and how many such blocks share a multiprocessor. On an H200 neither more
/// warps nor more slots are faster.
template <typename T, typename Layout>
using ScanRing = Ring<T, Layout, 4>;
template <typename Layout>
constexpr int kScanBlocks = Layout::kRounds == 8 ? 2 : 3;

/// Blocks per multiprocessor that the compiler must leave registers for. Compute capability 12.0 has shared memory for
/// only one.
template <typename Layout>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kScanOccupancy = 1;
#else
constexpr int kScanOccupancy = kScanBlocks<Layout>;
#endif

/// The predicate `more` of a TileStream with a known number of tiles.
struct Upto {
  int count;

  __device__ bool operator()(int n) const { return n < count; }
};

/// Streams a warp's tiles through its ring; kSlots tiles are being loaded at any time. The caller provides
///   more(n)           whether there is an nth tile
///   lookup(n)         a value from global memory that locates this lane's row of tile n
///   row_of(n, found)  the address of this lane's row of tile n; `found` is what lookup(n) returned
/// more and lookup are called one tile ahead of row_of, so that the latency of the look-up is hidden. All lanes of a
/// warp call what Slots provides:
///   begin()                     before the first load
///   load(slot, row, head_dim, policy)  starts to copy the rows of a tile; `row` is what row_of returned
///   end_load()                  after each load, and in place of loads that there is no tile for
///   wait(tile, slot)            until the rows of the warp's nth tile are in the slot
///   end()                       when all tiles have been read
template <typename Slots, typename More, typename Lookup, typename RowOf>
class TileStream {
 public:
  __device__ TileStream(Slots, More more, int head_dim, Lookup lookup, RowOf row_of, uint64_t policy = read_once())
      : head_dim_(head_dim), policy_(policy), more_(more), lookup_(lookup), row_of_(row_of) {}

  /// Starts the first loads, calls prepare(), and then for each tile n read(n, slot), which reads the slot, and
  /// finish(n) after the slot's next load has started. All lanes call.
  template <typename Prepare, typename Read, typename Finish>
  __device__ void run(Prepare prepare, Read read, Finish finish) {
    Slots::begin();
    if (more_(0)) next_ = lookup_(0);
#pragma unroll 1  // one copy of the code of each step
    for (int n = -Slots::kSlots, nth = 0;; ++n) {
      if (n == 0) prepare();
      if (n >= 0 && !more_(n)) break;
      if (n >= 0) {
        Slots::wait(n, nth);
        read(n, Slots::slot(nth));
        __syncwarp();  // all lanes have read the slot
      }
      load(n + Slots::kSlots, nth);
      if (n >= 0) finish(n);
      if (++nth == Slots::kSlots) nth = 0;
    }
    Slots::end();
  }

 private:
  __device__ void load(int n, int nth) {
    if (more_(n)) {
      const auto found = next_;
      if (more_(n + 1)) next_ = lookup_(n + 1);
      Slots::load(nth, row_of_(n, found), head_dim_, policy_);
    }
    Slots::end_load();
  }

  int head_dim_;
  uint64_t policy_;
  More more_;
  Lookup lookup_;
  RowOf row_of_;
  std::invoke_result_t<Lookup, int> next_{};
};

}  // namespace entmaxkv::cuda
