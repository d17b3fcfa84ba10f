// Finds the page of a given rank, from 1, in the order of falling merit, ties by rising page. Pages are counted in bins
// that become ever finer, until so few are left that each is compared with each. One block does this, or a cluster.
#pragma once

#include "../../entmax.h"
#include "../common/cluster.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda::page_ranks {

constexpr int kBits = 9;
constexpr int kBins = 1 << kBits;
constexpr int kRankThreads = kBins;
constexpr int kWarps = kRankThreads / 32;
constexpr int kWords = 4;                  // words of four pages that a thread handles at once
constexpr int kStride = 4 * kRankThreads;  // pages from one of a thread's words to the next
constexpr int kFew = 32;                   // most pages that are compared each with each

/// A page's merit and index as one number: a smaller number is a better page, and no two pages have the same.
using Order = unsigned long long;

/// Returns the order of a page. Adding 0 makes -0 equal to 0.
__device__ inline Order order_of(float merit, int page) {
  return Order{~ordered(merit + 0.0f)} << 32 | static_cast<uint32_t>(page);
}

/// Returns the merit of a page from its order.
__device__ inline float merit_of(Order order) { return from_ordered(~static_cast<uint32_t>(order >> 32)); }

/// The scores or merits of four successive pages.
struct Word {
  float of[4];

  static __device__ Word load(const float* from) {
    const float4 word = *reinterpret_cast<const float4*>(from);
    return {word.x, word.y, word.z, word.w};
  }

  __device__ void store(float* to) const { *reinterpret_cast<float4*>(to) = float4{of[0], of[1], of[2], of[3]}; }
};

/// Divides merits <= 0 into kBins steps, which are finer towards 0. With a unit of merit, there are kBins / 8 steps for
/// each power of two of 1 - merit / unit.
class Steps {
 public:
  /// Merits from -range on take 3/4 of the steps; lower merits take the others.
  __device__ explicit Steps(float range)
      : per_unit_(range > 0 ? fminf(kUnits / range, 3e38f) : 0), unit_(fmaxf(1.0001f / kUnits * range, 3.4e-39f)) {}

  /// Returns the step of a merit. A lower merit has the same or a higher step.
  __device__ int of(float merit) const {
    const float place = fminf(fmaxf(fmaf(-merit, per_unit_, 1), 1), 255.99f);
    return static_cast<int>((__float_as_uint(place) - kFirst) >> kShift);
  }

  /// Returns a lower bound of the merits of steps 0 ... step.
  __device__ float least(int step) const {
    if (step == kBins - 1 || per_unit_ == 0) return kNothing;
    return (1 - __uint_as_float(kFirst + ((step + 1) << kShift))) * unit_;
  }

 private:
  static constexpr float kUnits = 63;
  static constexpr uint32_t kFirst = 0x3f800000;  // 1.0f
  static constexpr int kShift = 26 - kBits;

  float per_unit_, unit_;
};

/// A thread's result of an exclusive scan.
struct Place {
  int before, total;  // sums over the threads before this one, and over all threads
};

/// Scans kValues values of each thread at once. All threads call.
template <int kValues>
__device__ void find_places(const int (&own)[kValues], Place (&places)[kValues]) {
  __shared__ int s_sums[kValues][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the sums of an earlier call have been read
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    places[i].before = sum_upto(own[i]) - own[i];
    if (lane == 31) s_sums[i][warp] = places[i].before + own[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int of_warp = lane < kWarps ? s_sums[i][lane] : 0;
    places[i].before += __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0);
    places[i].total = __reduce_add_sync(kAllLanes, of_warp);
  }
}

/// The bin that holds the item of a given rank: the bin's index, the number of its items, and the item's rank among
/// these (from 1).
struct Bin {
  int index, count, target_rank;
};

/// Counts of items in bins, in shared memory; bin 0 has the best items.
struct Histogram {
  int counts[kBins];
  Bin found;

  /// Clears the counts. All threads call, and then a barrier.
  __device__ void clear() { counts[threadIdx.x] = 0; }
  /// Counts an item. Any thread may call.
  __device__ void add(int bin) { atomicAdd(&counts[bin], 1); }

  /// Returns the bin with the item of rank target_rank among those that `blocks` blocks (1, or the whole cluster) have
  /// counted, or the last bin if there are fewer items. Then clears the counts. All threads of these blocks call and
  /// all get the result.
  __device__ ENTMAXKV_NOINLINE Bin find(int blocks, int target_rank) {
    const int bin = threadIdx.x;
    if (blocks == 1) {
      __syncthreads();
    } else {
      cluster::sync();
    }
    if (bin == 0) found = {kBins - 1, 0, 0};
    int count = blocks == 1 ? counts[bin] : 0;
    if (blocks > 1) {
#pragma unroll 1
      for (int rank = 0; rank < blocks; ++rank) count += cluster::of(rank, counts[bin]);
    }
    Place place[1];
    find_places<1>({count}, place);
    const int before = place[0].before;
    if (before < target_rank && target_rank <= before + count) found = {bin, count, target_rank - before};
    if (blocks > 1) cluster::sync();  // all blocks have read the counts
    counts[bin] = 0;
    __syncthreads();
    return found;
  }
};

/// This block's part of the pages in use, and their merits.
struct Slice {
  int begin, end;
  float* merits;  // [end - begin]

  /// Calls body(merit, page) for this thread's pages.
  template <typename Body>
  __device__ void visit(Body body) const {
#pragma unroll 1
    for (int page = begin + 4 * static_cast<int>(threadIdx.x); page < end; page += kStride) {
      const Word merit = Word::load(merits + (page - begin));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (page + i < end) body(merit.of[i], page + i);
      }
    }
  }

  /// Calls write(place, page) with place = 0, 1, ... for the pages with selects(merit, page), in ascending order.
  /// Returns their number to all threads. All threads call.
  template <typename Selects, typename Write>
  __device__ int collect(Selects selects, Write write) const {
    using Counts = unsigned long long;  // 16 bits for each of four words
    static_assert(kWords == 4 && kStride < 1 << 16);
    int count = 0;
#pragma unroll 1
    for (int tile = begin; tile < end; tile += kWords * kStride) {
      const int first = tile + 4 * static_cast<int>(threadIdx.x);
      uint32_t mask = 0;  // bit 4 w + i: whether page i of word w is selected
#pragma unroll 1
      for (int w = 0, page = first; w < kWords && page < end; ++w, page += kStride) {
        const Word merit = Word::load(merits + (page - begin));
#pragma unroll
        for (int i = 0; i < 4; ++i) mask |= (page + i < end && selects(merit.of[i], page + i)) << (4 * w + i);
      }
      const auto own = [&](int w) { return __popc(mask >> 4 * w & 15); };
      Place places[2];
      find_places<2>({own(0) + (own(1) << 16), own(2) + (own(3) << 16)}, places);
      const auto both = [](int low, int high) {
        return Counts{static_cast<uint32_t>(high)} << 32 | static_cast<uint32_t>(low);
      };
      const Counts total = both(places[0].total, places[1].total);
      const Counts upto = total + (total << 16) + (total << 32) + (total << 48);  // sums over the words up to each
      Counts next = both(places[0].before, places[1].before) + upto - total;
#pragma unroll 1
      for (; mask; mask &= mask - 1) {
        const int bit = __ffs(static_cast<int>(mask)) - 1, w = bit / 4;
        write(count + static_cast<int>(next >> 16 * w & 0xffff), first + w * kStride + bit % 4);
        next += Counts{1} << 16 * w;
      }
      count += static_cast<int>(upto >> 48);
    }
    return count;
  }
};

/// The search for the page of a given rank: the set of pages that may still be that page. It is at first all pages,
/// then those of one step, then those whose orders share ever more leading bits.
struct Narrowing {
  Steps steps;
  int step = -1;   // the pages' step, if >= 0
  int shift = 64;  // the bits of the pages' orders from this one on are those of `prefix`
  Order prefix = 0;

  /// Returns whether a page is in the set.
  __device__ bool has(float merit, int page) const {
    if (step >= 0 && steps.of(merit) != step) return false;
    return shift == 64 || order_of(merit, page) >> shift == prefix >> shift;
  }

  /// Returns the shift after the next narrowing.
  __device__ int next() const { return max(0, shift - kBits); }

  /// Narrows the set from `count` pages to at most `few`. Returns the rank, among these, of the page of rank
  /// target_rank. items.visit(body) calls body(merit, page) for this thread's pages; `blocks` blocks (1, or the whole
  /// cluster) have all pages together. All threads of these blocks call and all get the result.
  template <typename Items>
  __device__ int narrow(const Items& items, Histogram& s_histogram, int blocks, int count, int target_rank, int few) {
#pragma unroll 1
    while (count > few) {
      items.visit([&](float merit, int page) {
        if (step < 0) return s_histogram.add(steps.of(merit));
        if (has(merit, page)) s_histogram.add(static_cast<int>(order_of(merit, page) >> next() & (kBins - 1)));
      });
      const Bin found = s_histogram.find(blocks, target_rank);
      if (step < 0) {
        step = found.index;
      } else {
        shift = next();
        prefix |= static_cast<Order>(found.index) << shift;
      }
      count = found.count;
      target_rank = found.target_rank;
    }
    return target_rank;
  }
};

/// Returns the order of the page of rank target_rank among the `count` pages of `items`, which are all visited by this
/// block. All threads of the block call and all get the result.
template <typename Items>
__device__ Order pick(const Items& items, Histogram& s_histogram, const Steps& steps, int count, int target_rank) {
  __shared__ Order s_few[kFew], s_picked;
  __shared__ int s_count;
  if (threadIdx.x == 0) s_count = 0;
  __syncthreads();  // s_count is 0, and the items are complete
  Narrowing narrowing{steps};
  target_rank = narrowing.narrow(items, s_histogram, 1, count, target_rank, kFew);
  items.visit([&](float merit, int page) {
    if (narrowing.has(merit, page)) s_few[atomicAdd(&s_count, 1)] = order_of(merit, page);
  });
  __syncthreads();
  const int lane = threadIdx.x % 32, few = s_count;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < few; i += kWarps) {
    const uint32_t upto = __ballot_sync(kAllLanes, lane < few && s_few[lane] <= s_few[i]);
    if (__popc(upto) == target_rank) s_picked = s_few[i];
  }
  __syncthreads();
  return s_picked;
}

}  // namespace entmaxkv::cuda::page_ranks
