// select_pages on the GPU.
//   scores [batch, q_heads, max_pages] -> selected [batch, kv_heads, max_selected] ascending, counts [batch, kv_heads]
// Grid (blocks of a cluster, KV head, row); a cluster works for one list of pages, each of its blocks for a slice.
//   1. merit of a page: how close it comes to some head's own best page, max_h (score_h - best_h)
//   2. threshold: the last page that the budget pays for, in the order of falling merit, ties by rising page. A
//      histogram of 2048 equal steps of merit says in which step it is; while that holds many pages, a histogram of
//      their next 11 bits narrows it down; then each of them counts those before it.
//   3. collect: the pages up to the threshold, and the last page, in ascending order
#include "cluster.cuh"
#include "kernels.h"
#include "page_list.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kSlice = 1024;  // pages of a block, while the cluster can grow
constexpr int kMostBlocks = 8;
constexpr int kSharedMerits = 8704;
constexpr int kBits = 11;
constexpr int kBins = 1 << kBits;
constexpr int kFew = 256;  // pages that are compared each with each
constexpr int kHeads = 4;  // that are looked at together
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
  static_assert(kValues <= kThreads / 32 && kMostBlocks <= 32);
  if (warp < kValues) {
    const uint32_t own = lane < cluster::size() ? cluster::of(lane, values[warp]) : 0;
    const uint32_t largest = __reduce_max_sync(kAllLanes, own);
    if (lane == 0) results[warp] = from_ordered(largest);
  }
  __syncthreads();
}

/// A block's part of all that the cluster counts.
struct Part {
  int before;  // of the blocks of lower rank
  int all;
};

/// The parts of all blocks. The first warp calls, when all counts are there.
__device__ Part part_of(int rank, const int& count) {
  const int lane = threadIdx.x;
  const int own = lane < cluster::size() ? cluster::of(lane, count) : 0;
  const int upto = sum_upto(own);
  return {__shfl_sync(kAllLanes, upto - own, rank), __shfl_sync(kAllLanes, upto, 31)};
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

/// Finds the merits; returns how far the worst finite one of all is below 0. NaN has no say. All threads call.
__device__ float rate(const Slice& slice, const float* scores, int group, int max_pages, int last) {
  __shared__ uint32_t s_best[kHeads], s_range[1];
  __shared__ float s_best_of_all[kHeads], s_range_of_all[1];
  float range = 0;
  for (int first = 0; first < group; first += kHeads, scores += int64_t{kHeads} * max_pages) {
    const int heads = min(kHeads, group - first);
    if (first > 0) cluster::sync();  // the best of the heads before have been read
    if (threadIdx.x < kHeads) s_best[threadIdx.x] = ordered(kNothing);
    if (threadIdx.x == 0) s_range[0] = ordered(0.0f);
    __syncthreads();
    float best[kHeads] = {kNothing, kNothing, kNothing, kNothing};
    const int end = slice.end == last ? last + 1 : slice.end;  // the last page, too, may be a head's best
#pragma unroll 4
    for (int page = slice.begin + static_cast<int>(threadIdx.x); page < end; page += kThreads) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h < heads) best[h] = fmaxf(best[h], scores[int64_t{h} * max_pages + page]);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) raise(s_best[h], best[h]);
    cluster::sync();
    find_largest(s_best, s_best_of_all);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) best[h] = s_best_of_all[h];
    range = 0;
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
      if (merit > kNothing) range = fmaxf(range, -merit);
    }
  }
  raise(s_range[0], range);
  cluster::sync();
  find_largest(s_range, s_range_of_all);
  return s_range_of_all[0];
}

/// The bin that holds the wanted page: how many pages are in it, and the how manieth of them is wanted.
struct Bin {
  int index;
  int count;
  int wanted;
};

/// Counts all pages by bin_of(merit, page), which is negative for a page that does not count. All threads call.
template <typename BinOf>
__device__ Bin find_bin(const Slice& slice, int wanted, BinOf bin_of) {
  constexpr int kGroup = 8;  // bins that are counted together, so that few counts have to come from other blocks
  constexpr int kGroups = kBins / kGroup;
  __shared__ int s_counts[kBins], s_groups[kGroups];
  __shared__ Bin s_found;
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) s_counts[bin] = 0;
  __syncthreads();
  slice.visit([&](float merit, int page) {
    const int bin = bin_of(merit, page);
    if (bin >= 0) atomicAdd(&s_counts[bin], 1);
  });
  __syncthreads();
  const int group = threadIdx.x;
  if (group < kGroups) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) count += s_counts[group * kGroup + i];
    s_groups[group] = count;
  }
  cluster::sync();
  const auto all_of = [](const int& count) {
    int all = 0;
#pragma unroll 8
    for (int rank = 0; rank < cluster::size(); ++rank) all += cluster::of(rank, count);
    return all;
  };
  const int count = group < kGroups ? all_of(s_groups[group]) : 0;
  int total;
  const int before = exclusive_scan<kThreads>(count, total);
  if (before < wanted && wanted <= before + count) s_found = {group * kGroup, count, wanted - before};
  __syncthreads();
  if (threadIdx.x < 32) {
    const Bin of_group = s_found;
    const int bin = of_group.index + static_cast<int>(threadIdx.x);
    const int own = threadIdx.x < kGroup ? all_of(s_counts[bin]) : 0;
    const int upto = sum_upto(own);
    if (upto - own < of_group.wanted && of_group.wanted <= upto) s_found = {bin, own, of_group.wanted - (upto - own)};
  }
  __syncthreads();
  return s_found;
}

/// The wanted-th page in order; the worst merit is -range. All threads call.
__device__ Order find_threshold(const Slice& slice, int wanted, float range) {
  __shared__ Order s_own[kFew], s_all[kFew], s_threshold;
  __shared__ int s_count, s_first[kMostBlocks + 1];
  const float steps = range > 0 ? fminf((kBins - 1) / range, 3e38f) : 0;
  const auto step_of = [=](float merit) { return static_cast<int>(fminf(-merit * steps, kBins - 1)); };
  Bin found = find_bin(slice, wanted, [=](float merit, int) { return step_of(merit); });
  const int step = found.index;
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
    shift = next;
    prefix |= static_cast<Order>(found.index) << shift;
  }
  if (threadIdx.x == 0) s_count = 0;
  __syncthreads();
  slice.visit([&](float merit, int page) {
    if (step_of(merit) != step) return;
    const Order order = order_of(merit, page);
    if (is_candidate(merit, order)) s_own[atomicAdd(&s_count, 1)] = order;
  });
  cluster::sync();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == 0) {
    const int before = part_of(lane, s_count).before;
    if (lane <= cluster::size()) s_first[lane] = before;
  }
  __syncthreads();
  if (warp < cluster::size()) {
    for (int i = lane; i < s_first[warp + 1] - s_first[warp]; i += 32) {
      s_all[s_first[warp] + i] = cluster::of(warp, s_own[i]);
    }
  }
  __syncthreads();
  if (threadIdx.x < found.count) {
    int before = 0;
    for (int i = 0; i < found.count; ++i) before += s_all[i] < s_all[threadIdx.x];
    if (before == found.wanted - 1) s_threshold = s_all[threadIdx.x];
  }
  __syncthreads();
  return s_threshold;
}

__global__ void __launch_bounds__(kThreads, 1) select(SelectPages op, float* workspace) {
  take_turn();
  __shared__ float s_merits[kSharedMerits];
  __shared__ int s_selected;
  __shared__ Part s_part;
  const int64_t row = blockIdx.z;
  const int64_t list = row * op.kv_heads + blockIdx.y;
  const int seq_len = length_of(op, row);
  const int used = ceil_div(seq_len, op.page_size), last = used - 1;
  const int64_t left = op.budget - (seq_len - last * op.page_size);
  const int others = static_cast<int>(max(int64_t{0}, min(left / op.page_size, int64_t{last})));
  const bool choice = 0 < others && others < last;

  const int size = ceil_div(op.max_pages, cluster::size()), begin = min(cluster::rank() * size, used);
  const int end = min(begin + size, used);
  float* merits = size <= kSharedMerits ? s_merits : workspace + list * op.max_pages + begin;
  const Slice slice{begin, max(begin, min(end, last)), merits};
  Order threshold = 0;
  if (choice) {
    const float* scores = op.scores + list * op.group * op.max_pages;
    threshold = find_threshold(slice, others, rate(slice, scores, op.group, op.max_pages, last));
  }
  const auto wanted = [&](int page) {
    return page == last || (choice ? order_of(merits[page - begin], page) <= threshold : others == last);
  };
  int count = 0;
  for (int page = begin + static_cast<int>(threadIdx.x); page < end; page += kThreads) count += wanted(page);
  count = sum<kThreads>(count);
  if (threadIdx.x == 0) s_selected = count;
  cluster::sync();
  if (threadIdx.x < 32) s_part = part_of(cluster::rank(), s_selected);
  cluster::sync();  // nobody reads this block's memory any more
  int32_t* selected = op.selection.row(list);
  collect_pages<kThreads>(selected + s_part.before, begin, end, wanted);
  const int thread = cluster::rank() * kThreads + static_cast<int>(threadIdx.x);
  const int all = s_part.all;
  for (int to = all + thread; to < op.selection.max_selected; to += cluster::size() * kThreads) selected[to] = -1;
  if (thread == 0) op.selection.counts[list] = all;
}

}  // namespace

int64_t workspace_bytes(const SelectPages& op) {
  return int64_t{op.batch} * op.kv_heads * op.max_pages * static_cast<int64_t>(sizeof(float));
}

void select_pages(const SelectPages& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  int blocks = 1;
  while (is_hopper_or_later() && blocks < kMostBlocks && blocks * kSlice < op.max_pages) blocks *= 2;
  launch("select_pages", select, {dim3(blocks, op.kv_heads, op.batch), kThreads, blocks}, stream, op,
         static_cast<float*>(workspace));
}

}  // namespace entmaxkv::cuda
