// select_pages on the GPU.
//   scores [batch, q_heads, max_pages] -> selected [batch, kv_heads, max_selected] ascending, counts [batch, kv_heads]
// Grid (KV head, row); a block works for one list of pages.
//   1. merit of a page: how close it comes to some head's own best page, max_h (score_h - best_h)
//   2. threshold: the last page that the budget pays for, in the order of falling merit, ties by rising page. A
//      histogram of 2048 equal steps of merit says in which step it is; while that holds more pages than the block has
//      threads, a histogram of their next 11 bits narrows it down; then each of them counts those before it.
//   3. collect: the pages up to the threshold, and the last page, in ascending order
#include "kernels.h"
#include "page_list.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kBits = 11;
constexpr int kBins = 1 << kBits;
constexpr int kHeads = 8;  // that are looked at together
static_assert(kBins == 2 * kThreads && kThreads / 32 == 32);

/// Where a page stands: smaller is better, no two are equal.
using Order = unsigned long long;

__device__ Order order_of(float merit, int page) { return Order{~ordered(merit)} << 32 | static_cast<uint32_t>(page); }

/// best[h] = the best score of head h, for up to kHeads heads; NaN has no say. All threads call.
__device__ void find_best(const float* scores, int heads, int max_pages, int used, float (&best)[kHeads]) {
  __shared__ float s_best[kHeads][kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) best[h] = kNothing;
  for (int page = threadIdx.x; page < used; page += kThreads) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h < heads) best[h] = fmaxf(best[h], scores[int64_t{h} * max_pages + page]);
    }
  }
  __syncthreads();  // the values of an earlier call have been read
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    for (int distance = 16; distance > 0; distance /= 2) best[h] = fmaxf(best[h], shuffle_xor(best[h], distance));
    if (lane == 0) s_best[h][warp] = best[h];
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    best[h] = s_best[h][lane];
    for (int distance = 16; distance > 0; distance /= 2) best[h] = fmaxf(best[h], shuffle_xor(best[h], distance));
  }
}

/// Writes the merits of pages 0 ... last - 1, and returns the worst that is finite. All threads call.
__device__ float rate(const SelectPages& op, int64_t list, int used, int last, float* merits) {
  float worst = 0;
  for (int first = 0; first < op.group; first += kHeads) {
    const float* scores = op.scores + (list * op.group + first) * op.max_pages;
    const int heads = min(kHeads, op.group - first);
    float best[kHeads];
    find_best(scores, heads, op.max_pages, used, best);
    worst = 0;
    for (int page = threadIdx.x; page < last; page += kThreads) {
      float merit = first > 0 ? merits[page] : kNothing;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) continue;
        const float score = scores[int64_t{h} * op.max_pages + page];
        merit = fmaxf(merit, score == best[h] ? 0 : score - best[h]);
      }
      merits[page] = merit;
      if (merit > kNothing) worst = fminf(worst, merit);
    }
  }
  return reduce<kThreads>(worst, [](float a, float b) { return fminf(a, b); });
}

/// The bin that holds the wanted page: how many pages are in it, and the how manieth of them is wanted.
struct Bin {
  int index;
  int count;
  int wanted;
};

/// Counts pages 0 ... pages - 1 by bin_of(page), which is negative for a page that does not count. All threads call.
template <typename BinOf>
__device__ Bin find_bin(int pages, int wanted, BinOf bin_of) {
  __shared__ int s_counts[kBins];
  __shared__ Bin s_found;
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) s_counts[bin] = 0;
  __syncthreads();
  for (int page = threadIdx.x; page < pages; page += kThreads) {
    const int bin = bin_of(page);
    if (bin >= 0) atomicAdd(&s_counts[bin], 1);
  }
  __syncthreads();
  const int own[2] = {s_counts[2 * threadIdx.x], s_counts[2 * threadIdx.x + 1]};
  int total;
  int before = exclusive_scan<kThreads>(own[0] + own[1], total);
  for (int i = 0; i < 2; ++i) {
    if (before < wanted && wanted <= before + own[i]) {
      s_found = {2 * static_cast<int>(threadIdx.x) + i, own[i], wanted - before};
    }
    before += own[i];
  }
  __syncthreads();
  return s_found;
}

/// The wanted-th page in order, of 0 ... pages - 1. All threads call.
__device__ Order find_threshold(const float* merits, int pages, int wanted, float worst) {
  __shared__ Order s_orders[kThreads];
  __shared__ int s_count;
  __shared__ Order s_threshold;
  const float steps = worst < 0 ? fminf((kBins - 1) / -worst, 3e38f) : 0;
  const auto step_of = [=](float merit) { return static_cast<int>(fminf(-merit * steps, kBins - 1)); };
  Bin found = find_bin(pages, wanted, [=](int page) { return step_of(merits[page]); });
  const int step = found.index;
  Order prefix = 0;
  int shift = 64;  // the candidates share the bits from here on
  const auto is_candidate = [&](Order order, float merit) {
    return step_of(merit) == step && (shift == 64 || order >> shift == prefix >> shift);
  };
  while (found.count > kThreads) {
    const int next = max(0, shift - kBits);
    found = find_bin(pages, found.wanted, [&](int page) {
      const Order order = order_of(merits[page], page);
      return is_candidate(order, merits[page]) ? static_cast<int>(order >> next & (kBins - 1)) : -1;
    });
    shift = next;
    prefix |= static_cast<Order>(found.index) << shift;
  }
  if (threadIdx.x == 0) s_count = 0;
  __syncthreads();
  for (int page = threadIdx.x; page < pages; page += kThreads) {
    const Order order = order_of(merits[page], page);
    if (is_candidate(order, merits[page])) s_orders[atomicAdd(&s_count, 1)] = order;
  }
  __syncthreads();
  if (threadIdx.x < found.count) {
    int before = 0;
    for (int i = 0; i < found.count; ++i) before += s_orders[i] < s_orders[threadIdx.x];
    if (before == found.wanted - 1) s_threshold = s_orders[threadIdx.x];
  }
  __syncthreads();
  return s_threshold;
}

__global__ void __launch_bounds__(kThreads) select(SelectPages op, float* workspace) {
  const int64_t row = blockIdx.y;
  const int64_t list = row * op.kv_heads + blockIdx.x;
  const int seq_len = length_of(op, row);
  const int used = ceil_div(seq_len, op.page_size), last = used - 1;
  const int64_t left = op.budget - (seq_len - last * op.page_size);
  const int others = static_cast<int>(max(int64_t{0}, min(left / op.page_size, int64_t{last})));
  float* merits = workspace + list * op.max_pages;
  const bool choice = 0 < others && others < last;
  Order threshold = 0;
  if (choice) threshold = find_threshold(merits, last, others, rate(op, list, used, last, merits));
  collect_pages<kThreads>(op.selection, list, used, [&](int page) {
    return page == last || (choice ? order_of(merits[page], page) <= threshold : others == last);
  });
}

}  // namespace

int64_t workspace_bytes(const SelectPages& op) {
  return int64_t{op.batch} * op.kv_heads * op.max_pages * static_cast<int64_t>(sizeof(float));
}

void select_pages(const SelectPages& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  launch("select_pages", select, dim3(op.kv_heads, op.batch), kThreads, stream, op, static_cast<float*>(workspace));
}

}  // namespace entmaxkv::cuda
