// Tiles of 32 rows on their way to the warps that multiply them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "copy.cuh"
#include "element.cuh"
#include "launch.cuh"
#include "sizes.cuh"

namespace entmaxkv::cuda {

constexpr int kTileRows = 32;

/// How rows are held: in kRounds of 32 dimensions, copied 16 bytes at a time or one element.
template <int kRoundsOf32, bool kInVectors>
struct Layout {
  static constexpr int kRounds = kRoundsOf32;
  static constexpr int kDims = 32 * kRounds;
  static constexpr bool kVectors = kInVectors;
};

/// Whether rows can be read 16 bytes at a time.
inline bool in_vectors(const Rows& rows, Dtype dtype, int head_dim) {
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  int64_t all = reinterpret_cast<int64_t>(rows.data) | head_dim * bytes;
  for (const int64_t stride : rows.stride) all |= stride * bytes;
  return all % 16 == 0;
}

/// Calls body with the smallest Layout for head_dim. Odd sizes and alignments share one.
template <typename Body>
void dispatch_layout(int head_dim, bool vectors, Body body) {
  if (!vectors) return body(Layout<8, false>{});
  if (head_dim <= 64) return body(Layout<2, true>{});
  if (head_dim <= 128) return body(Layout<4, true>{});
  return body(Layout<8, true>{});
}

/// 16 bytes of a row from dimension d on, zeros behind head_dim; in one load, if the rows are in vectors.
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

template <typename T>
__device__ void unpack(const uint4& word, float (&values)[16 / sizeof(T)]) {
  const T* from = reinterpret_cast<const T*>(&word);
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) values[i] = to_float(from[i]);
}

/// The rows of a tile in shared memory.
template <typename T, typename Layout>
struct Slot {
  static constexpr int kWords = Layout::kDims * static_cast<int>(sizeof(T)) / 16;  // of a row
  static constexpr int kLanePart = kWords / 4;                                     // those that one lane multiplies
  uint4 words[kTileRows * kWords];

  /// Neighbours, and rows 4 apart, are read together: they stand in different banks.
  __device__ static int index(int row, int word) { return row * kWords + (word ^ (row & 7)); }

  __device__ const uint4& word(int row, int nth) const {
    return words[index(row, 4 * nth + static_cast<int>(threadIdx.x % 4))];
  }

  /// Begins to copy 32 rows, of which lane i knows where row i is. All lanes call.
  __device__ void load(const T* row, int head_dim) {
    constexpr int kCount = 16 / sizeof(T);
    const auto address = reinterpret_cast<unsigned long long>(row);
#pragma unroll 4  // small kernels wait for their instructions
    for (int i = 0; i < kWords; ++i) {
      const int at = i * 32 + static_cast<int>(threadIdx.x % 32), from = at / kWords, nth = at % kWords;
      const T* its_row = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, from));
      uint4& to = words[index(from, nth)];
      if constexpr (Layout::kVectors) {
        copy_async(to, its_row + nth * kCount, nth * kCount < head_dim);
      } else {
        to = load_word<false>(its_row, nth * kCount, head_dim);
      }
    }
  }
};

constexpr int kRingBytes = 64 << 10;  // at most

/// A ring of slots for each warp of a block that multiplies tiles, in its dynamic shared memory.
template <typename TheT, typename TheLayout, int kMostWarps>
struct Ring {
  using T = TheT;
  using Layout = TheLayout;
  static constexpr int kSlotBytes = sizeof(Slot<T, Layout>);
  static constexpr int kWarps = std::min(kMostWarps, kRingBytes / kSlotBytes);
  static constexpr int kSlots = std::min(4, kRingBytes / kSlotBytes / kWarps);
  static constexpr int kBytes = kWarps * kSlots * kSlotBytes;

  static __device__ Slot<T, Layout>& slot(int nth) {
    return reinterpret_cast<Slot<T, Layout>*>(dynamic_shared())[threadIdx.x / 32 * kSlots + nth];
  }
};

/// Of a block that does nothing else, and how many of those share a multiprocessor. On an H200 neither more warps nor
/// more slots are faster.
template <typename T, typename Layout>
using ScanRing = Ring<T, Layout, 4>;
template <typename Layout>
constexpr int kScanBlocks = Layout::kRounds == 8 ? 2 : 3;

/// How many of them registers must suffice for: compute capability 12.0 has shared memory for one.
template <typename Layout>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kScanOccupancy = 1;
#else
constexpr int kScanOccupancy = kScanBlocks<Layout>;
#endif

/// Says of a known number of tiles whether there is an nth.
struct Upto {
  int count;

  __device__ bool operator()(int n) const { return n < count; }
};

/// A warp's tiles on their way through its ring: kSlots of them are being loaded at any time. more(n) says whether
/// there is an nth tile, and lookup(n) finds in memory what row_of(n, found) needs to know where this lane's row of it
/// is; both are called one tile before.
template <typename Slots, typename More, typename Lookup, typename RowOf>
class TileStream {
 public:
  __device__ TileStream(Slots, More more, int head_dim, Lookup lookup, RowOf row_of)
      : head_dim_(head_dim), more_(more), lookup_(lookup), row_of_(row_of) {}

  /// Calls prepare() once the first tiles are under way, and then, for each tile in turn, read(n, slot) and, when its
  /// slot is being filled again, finish(n). All lanes call.
  template <typename Prepare, typename Read, typename Finish>
  __device__ void run(Prepare prepare, Read read, Finish finish) {
    if (more_(0)) next_ = lookup_(0);
#pragma unroll 1  // so that each part is there once
    for (int n = -Slots::kSlots, nth = 0;; ++n) {
      if (n == 0) prepare();
      if (n >= 0 && !more_(n)) break;
      if (n >= 0) {
        wait_for_copies<Slots::kSlots - 1>();
        __syncwarp();  // the other lanes' copies, too
        read(n, Slots::slot(nth));
        __syncwarp();  // all have read
      }
      load(n + Slots::kSlots, nth);
      if (n >= 0) finish(n);
      if (++nth == Slots::kSlots) nth = 0;
    }
  }

 private:
  __device__ void load(int n, int nth) {
    if (more_(n)) {
      const auto found = next_;
      if (more_(n + 1)) next_ = lookup_(n + 1);
      Slots::slot(nth).load(row_of_(n, found), head_dim_);
    }
    commit_copies();
  }

  int head_dim_;
  More more_;
  Lookup lookup_;
  RowOf row_of_;
  std::invoke_result_t<Lookup, int> next_{};
};

}  // namespace entmaxkv::cuda
