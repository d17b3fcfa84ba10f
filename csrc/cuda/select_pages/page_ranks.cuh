// Which of many pages is the wanted-th by merit, ties by rising page: by counting them in ever finer steps, until few
// are left to compare. A block does that alone, or the blocks of a cluster together.
#pragma once

#include "../../entmax.h"
#include "../common/cluster.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda::page_ranks {

constexpr int kBits = 9;
constexpr int kBins = 1 << kBits;
constexpr int kRankThreads = kBins;
constexpr int kWarps = kRankThreads / 32;
constexpr int kWords = 4;                  // of four pages, that a thread looks at together
constexpr int kStride = 4 * kRankThreads;  // pages from one of a thread's words to the next
constexpr int kFew = 32;                   // that are compared each with each

/// Where a page stands: smaller is better, no two are equal.
using Order = unsigned long long;

/// The zeros are equal.
__device__ inline Order order_of(float merit, int page) {
  return Order{~ordered(merit + 0.0f)} << 32 | static_cast<uint32_t>(page);
}

__device__ inline float merit_of(Order order) { return from_ordered(~static_cast<uint32_t>(order >> 32)); }

/// Four pages' scores or merits.
struct Word {
  float of[4];

  static __device__ Word load(const float* from) {
    const float4 word = *reinterpret_cast<const float4*>(from);
    return {word.x, word.y, word.z, word.w};
  }

  __device__ void store(float* to) const { *reinterpret_cast<float4*>(to) = float4{of[0], of[1], of[2], of[3]}; }
};

/// Merits in steps, finer towards the best: kBins / 8 for every power of two of 1 + distance / unit.
class Steps {
 public:
  /// The merits from -range on take 3/4 of the steps, and others find room below.
  __device__ explicit Steps(float range)
      : per_unit_(range > 0 ? fminf(kUnits / range, 3e38f) : 0), unit_(fmaxf(1.0001f / kUnits * range, 3.4e-39f)) {}

  __device__ int of(float merit) const {
    const float place = fminf(fmaxf(fmaf(-merit, per_unit_, 1), 1), 255.99f);
    return static_cast<int>((__float_as_uint(place) - kFirst) >> kShift);
  }

  /// No merit of that step, or a better one, is below.
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

/// The sum over all threads before this one, and over all.
struct Place {
  int before, total;
};

/// From each thread's own values. All threads call.
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

/// The bin that holds the wanted item: how many are in it, and which of them is wanted, counted from 1.
struct Bin {
  int index, count, wanted;
};

struct Histogram {
  int counts[kBins];
  Bin found;

  __device__ void clear() { counts[threadIdx.x] = 0; }
  __device__ void add(int bin) { atomicAdd(&counts[bin], 1); }

  /// Of what the threads of all blocks that share the items have added since it was cleared, which it is again. The
  /// last bin, if there are too few items. All threads call.
  __device__ ENTMAXKV_NOINLINE Bin find(int blocks, int wanted) {
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
    if (before < wanted && wanted <= before + count) found = {bin, count, wanted - before};
    if (blocks > 1) cluster::sync();  // the counts have been read
    counts[bin] = 0;
    __syncthreads();
    return found;
  }
};

/// This block's part of the pages in use, and their merits.
struct Slice {
  int begin, end;
  float* merits;  // [end - begin]

  /// Calls body(merit, page) for all of this thread's.
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

  /// Calls write(place, page) for the pages for which wanted(merit, page) holds, which have the places 0, 1, ... in
  /// ascending order. Returns how many there are. All threads call.
  template <typename Wanted, typename Write>
  __device__ int collect(Wanted wanted, Write write) const {
    using Counts = unsigned long long;  // of each word, 16 bits
    static_assert(kWords == 4 && kStride < 1 << 16);
    int count = 0;
#pragma unroll 1
    for (int tile = begin; tile < end; tile += kWords * kStride) {
      const int first = tile + 4 * static_cast<int>(threadIdx.x);
      uint32_t chosen = 0;
#pragma unroll 1
      for (int w = 0, page = first; w < kWords && page < end; ++w, page += kStride) {
        const Word merit = Word::load(merits + (page - begin));
#pragma unroll
        for (int i = 0; i < 4; ++i) chosen |= (page + i < end && wanted(merit.of[i], page + i)) << (4 * w + i);
      }
      const auto own = [&](int w) { return __popc(chosen >> 4 * w & 15); };
      Place places[2];
      find_places<2>({own(0) + (own(1) << 16), own(2) + (own(3) << 16)}, places);
      const auto both = [](int low, int high) {
        return Counts{static_cast<uint32_t>(high)} << 32 | static_cast<uint32_t>(low);
      };
      const Counts total = both(places[0].total, places[1].total);
      const Counts upto = total + (total << 16) + (total << 32) + (total << 48);  // words up to each
      Counts next = both(places[0].before, places[1].before) + upto - total;
#pragma unroll 1
      for (; chosen; chosen &= chosen - 1) {
        const int bit = __ffs(static_cast<int>(chosen)) - 1, w = bit / 4;
        write(count + static_cast<int>(next >> 16 * w & 0xffff), first + w * kStride + bit % 4);
        next += Counts{1} << 16 * w;
      }
      count += static_cast<int>(upto >> 48);
    }
    return count;
  }
};

/// The pages among which the wanted one is: at first all, then those of a step, then those that share ever more bits.
struct Candidates {
  Steps steps;
  int step = -1;
  int shift = 64;  // the bits from here on are those of prefix
  Order prefix = 0;

  __device__ bool have(float merit, int page) const {
    if (step >= 0 && steps.of(merit) != step) return false;
    return shift == 64 || order_of(merit, page) >> shift == prefix >> shift;
  }

  __device__ int next() const { return max(0, shift - kBits); }

  /// Narrows them down until at most `few` of `count` are left; returns which of them is wanted. All threads call.
  /// items.visit(body) calls body(merit, page) for this thread's, which `blocks` share.
  template <typename Items>
  __device__ int narrow(const Items& items, Histogram& s_histogram, int blocks, int count, int wanted, int few) {
#pragma unroll 1
    while (count > few) {
      items.visit([&](float merit, int page) {
        if (step < 0) return s_histogram.add(steps.of(merit));
        if (have(merit, page)) s_histogram.add(static_cast<int>(order_of(merit, page) >> next() & (kBins - 1)));
      });
      const Bin found = s_histogram.find(blocks, wanted);
      if (step < 0) {
        step = found.index;
      } else {
        shift = next();
        prefix |= static_cast<Order>(found.index) << shift;
      }
      count = found.count;
      wanted = found.wanted;
    }
    return wanted;
  }
};

/// Of `count` items, which this block has all, the wanted-th. All threads call.
template <typename Items>
__device__ Order pick(const Items& items, Histogram& s_histogram, const Steps& steps, int count, int wanted) {
  __shared__ Order s_few[kFew], s_picked;
  __shared__ int s_count;
  if (threadIdx.x == 0) s_count = 0;
  __syncthreads();  // the items, too, are there
  Candidates candidates{steps};
  wanted = candidates.narrow(items, s_histogram, 1, count, wanted, kFew);
  items.visit([&](float merit, int page) {
    if (candidates.have(merit, page)) s_few[atomicAdd(&s_count, 1)] = order_of(merit, page);
  });
  __syncthreads();
  const int lane = threadIdx.x % 32, few = s_count;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < few; i += kWarps) {
    const uint32_t upto = __ballot_sync(kAllLanes, lane < few && s_few[lane] <= s_few[i]);
    if (__popc(upto) == wanted) s_picked = s_few[i];
  }
  __syncthreads();
  return s_picked;
}

}  // namespace entmaxkv::cuda::page_ranks
