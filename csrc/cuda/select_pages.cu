// select_pages on the GPU.
//   scores [batch, q_heads, max_pages] -> selected [batch, kv_heads, max_selected] ascending, counts [batch, kv_heads]
// Grid (blocks of a cluster, KV head, row); a cluster works for one list of pages, each of its blocks for a slice.
//   1. merit of a page: how close it comes to some head's own best page, max_h (score_h - best_h)
//   2. threshold: the last page that the budget pays for, in the order of falling merit, ties by rising page. A
//      histogram of equal steps of merit says in which step it is; while that holds many pages, a histogram of their
//      next bits narrows it down; then each of them counts those before it.
//   3. collect: the pages up to the threshold, and the last page, in ascending order
#include "cluster.cuh"
#include "kernels.h"
#include "page_list.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kBits = 9;
constexpr int kBins = 1 << kBits;
constexpr int kThreads = kBins;
constexpr int kSlice = 1024;  // pages of a block, while the cluster can grow
using cluster::kMostBlocks;
constexpr int kSharedMerits = 17 * kThreads;  // fits the 48 KB of static shared memory
constexpr int kFew = 256;                     // pages that are compared each with each
constexpr int kHeads = 4;                     // that are looked at together
static_assert(kFew <= kThreads && kMostBlocks <= kThreads / 32);

/// Where a page stands: smaller is better, no two are equal.
using Order = unsigned long long;

__device__ Order order_of(float merit, int page) { return Order{~ordered(merit)} << 32 | static_cast<uint32_t>(page); }

/// Raises an ordered value in shared memory to the warp's largest. All lanes call.
__device__ void raise(uint32_t& shared, float value) {
  const uint32_t largest = __reduce_max_sync(kAllLanes, ordered(value));
  if (threadIdx.x % 32 == 0) atomicMax(&shared, largest);
}

/// results[i] = the largest values[i] of any block of the cluster. All threads call, when all values are there.
template <int kValues>
__device__ void find_largest(const uint32_t (&values)[kValues], float (&results)[kValues]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  static_assert(kValues <= kThreads / 32);
  if (warp < kValues) {
    const uint32_t own = lane < cluster::size() ? cluster::of(lane, values[warp]) : 0;
    const uint32_t largest = __reduce_max_sync(kAllLanes, own);
    if (lane == 0) results[warp] = from_ordered(largest);
  }
  __syncthreads();
}

/// What the blocks of rank lower than `rank`, each lane's own, count together. The first warp calls, when all counts
/// are there.
__device__ int count_before(int rank, const int& count) {
  const int lane = threadIdx.x;
  const int own = lane < cluster::size() ? cluster::of(lane, count) : 0;
  return __shfl_sync(kAllLanes, sum_upto(own) - own, rank);
}

/// This block's part of the pages before the last one, and their merits.
struct Slice {
  int begin, end;
  float* merits;  // [end - begin]

  /// Calls body(merit, page) for all of this thread's.
  template <typename Body>
  __device__ void visit(Body body) const {
#pragma unroll 4
    for (int page = begin + static_cast<int>(threadIdx.x); page < end; page += kThreads) {
      body(merits[page - begin], page);
    }
  }
};

/// Finds the merits. Returns, of the head where that is least, how far the worst finite score is from the best: only
/// pages with an infinite score can have a merit further below 0. NaN has no say. All threads call.
__device__ float rate(const Slice& slice, const float* scores, int group, int max_pages, int last) {
  enum { kBest, kNegated, kExtremes };  // of a head: the largest score, and the largest finite -score
  __shared__ uint32_t s_own[kExtremes * kHeads];
  __shared__ float s_all[kExtremes * kHeads];
  float range = -kNothing;
  for (int first = 0; first < group; first += kHeads, scores += int64_t{kHeads} * max_pages) {
    const int heads = min(kHeads, group - first);
    if (first > 0) cluster::sync();  // the extremes of the heads before have been read
    if (threadIdx.x < kExtremes * kHeads) s_own[threadIdx.x] = ordered(kNothing);
    __syncthreads();
    float extremes[kExtremes][kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) extremes[kBest][h] = extremes[kNegated][h] = kNothing;
    const int end = slice.end == last ? last + 1 : slice.end;  // the last page, too, may be a head's best
#pragma unroll 4
    for (int page = slice.begin + static_cast<int>(threadIdx.x); page < end; page += kThreads) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) continue;
        const float score = scores[int64_t{h} * max_pages + page];
        extremes[kBest][h] = fmaxf(extremes[kBest][h], score);
        if (score > kNothing) extremes[kNegated][h] = fmaxf(extremes[kNegated][h], -score);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      raise(s_own[h], extremes[kBest][h]);
      raise(s_own[kHeads + h], extremes[kNegated][h]);
    }
    cluster::sync();
    find_largest(s_own, s_all);
    float best[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      best[h] = s_all[h];
      const float range_of_head = best[h] + s_all[kHeads + h];
      if (range_of_head >= 0) range = fminf(range, range_of_head);
    }
#pragma unroll 4
    for (int page = slice.begin + static_cast<int>(threadIdx.x); page < slice.end; page += kThreads) {
      float merit = first > 0 ? slice.merits[page - slice.begin] : kNothing;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) continue;
        const float score = scores[int64_t{h} * max_pages + page];
        merit = fmaxf(merit, score == best[h] ? 0 : score - best[h]);
      }
      slice.merits[page - slice.begin] = merit;
    }
  }
  __syncthreads();
  return range;
}

/// The bin that holds the wanted page: how many pages are in it, and which of them is wanted, counted from 1.
struct Bin {
  int index;
  int count;
  int wanted;
  int better;  // pages of this block in bins before
};

/// Counts all pages by bin_of(merit, page), which is negative for a page that does not count. All threads call.
template <typename BinOf>
__device__ Bin find_bin(const Slice& slice, int wanted, BinOf bin_of) {
  __shared__ int s_counts[kBins];
  __shared__ Bin s_found;
  const int bin = threadIdx.x;
  s_counts[bin] = 0;
  __syncthreads();
  slice.visit([&](float merit, int page) {
    const int its_bin = bin_of(merit, page);
    if (its_bin >= 0) atomicAdd(&s_counts[its_bin], 1);
  });
  cluster::sync();
  int count = 0;
#pragma unroll 8
  for (int rank = 0; rank < cluster::size(); ++rank) count += cluster::of(rank, s_counts[bin]);
  using Both = long long;  // all pages, and this block's
  constexpr Both kAll = Both{1} << 32;
  Both total;
  const Both before = exclusive_scan<kThreads>(kAll * count + s_counts[bin], total);
  const auto all_before = static_cast<int>(before / kAll);
  if (all_before < wanted && wanted <= all_before + count) {
    s_found = {bin, count, wanted - all_before, static_cast<int>(before % kAll)};
  }
  __syncthreads();
  return s_found;
}

/// The last page that the budget pays for, and where a block's pages go.
struct Threshold {
  Order order;
  int before;  // pages of blocks of lower rank that are selected
};

/// The wanted-th page in order. Most merits are above -range. All threads call.
__device__ Threshold find_threshold(const Slice& slice, int wanted, float range) {
  __shared__ Order s_own[kFew], s_all[kFew], s_threshold;
  __shared__ int s_count, s_better, s_before, s_first[kMostBlocks + 1];
  const float steps = range > 0 ? fminf((kBins - 1) / range, 3e38f) : 0;
  const auto step_of = [=](float merit) { return static_cast<int>(fminf(-merit * steps, kBins - 1)); };
  Bin found = find_bin(slice, wanted, [=](float merit, int) { return step_of(merit); });
  const int step = found.index;
  int better = found.better;
  Order prefix = 0;
  int shift = 64;  // the candidates share the bits from here on
  const auto is_candidate = [&](float merit, Order order) {
    return step_of(merit) == step && (shift == 64 || order >> shift == prefix >> shift);
  };
  while (found.count > kFew) {
    cluster::sync();  // the counts have been read
    const int next = max(0, shift - kBits);
    found = find_bin(slice, found.wanted, [&](float merit, int page) {
      const Order order = order_of(merit, page);
      return is_candidate(merit, order) ? static_cast<int>(order >> next & (kBins - 1)) : -1;
    });
    better += found.better;
    shift = next;
    prefix |= static_cast<Order>(found.index) << shift;
  }
  if (threadIdx.x == 0) {
    s_count = 0;
    s_better = better;
  }
  __syncthreads();
  slice.visit([&](float merit, int page) {
    if (step_of(merit) != step) return;
    const Order order = order_of(merit, page);
    if (is_candidate(merit, order)) s_own[atomicAdd(&s_count, 1)] = order;
  });
  cluster::sync();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == 0) {
    const int first = count_before(lane, s_count), better_before = count_before(cluster::rank(), s_better);
    if (lane <= cluster::size()) s_first[lane] = first;
    if (lane == 0) s_before = better_before;
  }
  __syncthreads();
  if (warp < cluster::size()) {
    for (int i = lane; i < s_first[warp + 1] - s_first[warp]; i += 32) {
      s_all[s_first[warp] + i] = cluster::of(warp, s_own[i]);
    }
  }
  __syncthreads();
  const bool is_one = threadIdx.x < found.count;
  int place = 0;
  if (is_one) {
    for (int i = 0; i < found.count; ++i) place += s_all[i] < s_all[threadIdx.x];
    if (place == found.wanted - 1) s_threshold = s_all[threadIdx.x];
  }
  const bool before = is_one && place < found.wanted && static_cast<int>(threadIdx.x) < s_first[cluster::rank()];
  const int chosen_before = sum<kThreads>(before ? 1 : 0);
  return {s_threshold, s_before + chosen_before};
}

__global__ void __launch_bounds__(kThreads, 1) select(SelectPages op, int slice_pages, float* workspace) {
  take_turn();
  __shared__ float s_merits[kSharedMerits];
  const int64_t row = blockIdx.z;
  const int64_t list = row * op.kv_heads + blockIdx.y;
  const int seq_len = length_of(op, row), page_bits = __ffs(op.page_size) - 1;
  const int last = (seq_len - 1) >> page_bits;
  const int64_t left = op.budget - (seq_len - last * op.page_size);
  const int others = last < 0 ? 0 : static_cast<int>(max(int64_t{0}, min(left >> page_bits, int64_t{last})));

  const int begin = min(cluster::rank() * slice_pages, max(last, 0)), end = min(begin + slice_pages, max(last, 0));
  float* merits = slice_pages <= kSharedMerits ? s_merits : workspace + list * op.max_pages + begin;
  const Slice slice{begin, end, merits};
  const bool choice = 0 < others && others < last;
  Threshold threshold{0, others > 0 ? begin : 0};
  if (choice) {
    const float* scores = op.scores + list * op.group * op.max_pages;
    threshold = find_threshold(slice, others, rate(slice, scores, op.group, op.max_pages, last));
  }
  cluster::arrive();  // this block reads no other's memory any more
  int32_t* selected = op.selection.row(list);
  collect_pages<kThreads>(selected + threshold.before, begin, end, [&](int page) {
    return choice ? order_of(merits[page - begin], page) <= threshold.order : others > 0;
  });
  const int count = last < 0 ? 0 : others + 1, thread = cluster::rank() * kThreads + static_cast<int>(threadIdx.x);
  for (int to = count + thread; to < op.selection.max_selected; to += cluster::size() * kThreads) selected[to] = -1;
  if (thread == 0) {
    op.selection.counts[list] = count;
    if (count > 0) selected[others] = last;
  }
  cluster::wait();
}

}  // namespace

int64_t workspace_bytes(const SelectPages& op) {
  if (op.max_pages <= kSharedMerits) return 0;  // however many blocks
  return int64_t{op.batch} * op.kv_heads * op.max_pages * static_cast<int64_t>(sizeof(float));
}

void select_pages(const SelectPages& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  int blocks = 1;
  while (blocks < cluster::most_blocks() && blocks * kSlice < op.max_pages) blocks *= 2;
  launch("select_pages", select, {dim3(blocks, op.kv_heads, op.batch), kThreads, blocks}, stream, op,
         ceil_div(op.max_pages, blocks), static_cast<float*>(workspace));
}

}  // namespace entmaxkv::cuda
