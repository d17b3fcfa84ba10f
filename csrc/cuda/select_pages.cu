// select_pages on the GPU.
//   scores [batch, q_heads, max_pages] -> selected [batch, kv_heads, max_selected] ascending, counts [batch, kv_heads]
// Grid (KV head, row); a block of 1024 threads works for one list of pages.
//   1. merit of a page: how close it comes to some head's own best page, max_h (score_h - best_h), as an unsigned
//      number of the same order
//   2. threshold: the merit of the last page that the budget pays for, by radix select: histograms of 11, 11 and 10
//      bits, from the highest down, of the pages that share all higher bits with it
//   3. collect: pages above the threshold, the first ones at it, and the last page, in ascending order
#include "kernels.h"
#include "page_list.cuh"

namespace entmaxkv::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 2048;

/// What is known of the threshold: its bits above `shift`, and how many pages are wanted of those that share them.
struct Threshold {
  uint32_t bits;
  int shift;
  int wanted;
};

/// Fixes the next `width` bits. All threads call.
__device__ Threshold narrow(Threshold threshold, int width, const uint32_t* merits, int pages) {
  __shared__ int s_counts[kBins];
  __shared__ Threshold s_next;
  const int shift = threshold.shift - width;
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) s_counts[bin] = 0;
  __syncthreads();
  for (int page = threadIdx.x; page < pages; page += kThreads) {
    const uint32_t merit = merits[page];
    const bool candidate = threshold.shift == 32 || merit >> threshold.shift == threshold.bits >> threshold.shift;
    if (candidate) atomicAdd(&s_counts[merit >> shift & ((1u << width) - 1)], 1);
  }
  __syncthreads();
  // A thread has two bins, the first threads the highest ones.
  const int high = kBins - 1 - 2 * threadIdx.x;
  const int counts[2] = {s_counts[high], s_counts[high - 1]};
  int total;
  int above = exclusive_scan<kThreads>(counts[0] + counts[1], total);
  for (int i = 0; i < 2; ++i) {
    if (above < threshold.wanted && threshold.wanted <= above + counts[i]) {
      s_next = {threshold.bits | static_cast<uint32_t>(high - i) << shift, shift, threshold.wanted - above};
    }
    above += counts[i];
  }
  __syncthreads();
  return s_next;
}

__global__ void __launch_bounds__(kThreads) select(SelectPages op, uint32_t* workspace) {
  const int64_t row = blockIdx.y;
  const int64_t list = row * op.kv_heads + blockIdx.x;
  const int seq_len = length_of(op, row);
  const int used = ceil_div(seq_len, op.page_size), last = used - 1;
  const int64_t left = op.budget - (seq_len - last * op.page_size);
  const int others = static_cast<int>(max(int64_t{0}, min(left / op.page_size, int64_t{last})));
  uint32_t* merits = workspace + list * op.max_pages;
  Threshold threshold{0, 0, 0};
  if (0 < others && others < last) {
    for (int h = 0; h < op.group; ++h) {
      const float* scores = op.scores + (list * op.group + h) * op.max_pages;
      float best = kNothing;
      for (int page = threadIdx.x; page < used; page += kThreads) best = fmaxf(best, scores[page]);
      best = largest<kThreads>(best);
      for (int page = threadIdx.x; page < last; page += kThreads) {
        const float distance = scores[page] == best ? 0 : scores[page] - best;
        const uint32_t merit = ordered(distance == distance ? distance : kNothing);  // a head of NaN has no say
        merits[page] = h == 0 ? merit : max(merits[page], merit);
      }
    }
    threshold = {0, 32, others};
    for (const int width : {11, 11, 10}) threshold = narrow(threshold, width, merits, last);
  }
  PageList<kThreads> pages(op.selection, list);
  int ties = 0;  // pages at the threshold so far
  for (int first = 0; first < used; first += kThreads) {
    const int page = first + threadIdx.x;
    bool wanted = page < last && others == last;
    if (0 < others && others < last) {
      const bool inside = page < last;
      const bool tied = inside && merits[page] == threshold.bits;
      int more;
      const int rank = ties + exclusive_scan<kThreads>(tied, more);
      ties += more;
      wanted = inside && (merits[page] > threshold.bits || (tied && rank < threshold.wanted));
    }
    pages.append(page, wanted || page == last);
  }
  pages.finish();
}

}  // namespace

int64_t workspace_bytes(const SelectPages& op) {
  return int64_t{op.batch} * op.kv_heads * op.max_pages * static_cast<int64_t>(sizeof(uint32_t));
}

void select_pages(const SelectPages& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  launch("select_pages", select, dim3(op.kv_heads, op.batch), kThreads, stream, op, static_cast<uint32_t*>(workspace));
}

}  // namespace entmaxkv::cuda
