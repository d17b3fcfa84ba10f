// select_sketch on the GPU.
//   q, sketch [pages, kv_heads, ...] -> selected tokens [batch, kv_heads, max_selected] ascending, counts
//   1. scan: a warp bounds the scores of a chunk of tokens by plane 0 of their codes, for up to 4 query heads. It
//      writes the bounds in fp16, rounded up, and the best token of each class of the chunk. Token t is in class
//      t / 4 % kClasses. So neighbours, which often have weight together, can all be among the best tokens.
//   2. find_floors: a block per query head scores kExact of the best tokens exactly. The floor is the threshold of
//      these tokens, which is at most the threshold of all. For alpha = 1 it is kBelow under their logsumexp; there is
//      no floor if all tokens of the row may be selected.
//   3. refine: for tokens whose bound is above a floor, plane 1 tightens the bound. Tokens whose bound is still above a
//      floor are candidates. Each candidate has a bit.
//   4. cap, only if max_selected is less than a row can have: keeps the candidates with the highest merits.
//   5. list_selected: lists the tokens whose bits are set.
#include "kernels.h"
#include "select_sketch/floors.cuh"
#include "select_sketch/refine.cuh"
#include "select_sketch/scan.cuh"

namespace entmaxkv::cuda {

namespace {

using namespace sketch_selection;

/// Writes the upper bound of the weight of a head's tokens that are not selected: 1 if the head's alpha is not valid.
/// Any thread may call.
__device__ void write_bound(const SelectSketch& op, int64_t row, int head, double weight) {
  op.delta_bound[row * op.q_heads + head] = op.alpha.is_valid(head) ? sketch::rounded_up(weight) : 1;
}

/// Step 4: if there are more candidates than room, removes the bits of all candidates below the least merit that stays.
/// Writes the bound of the weight of the tokens that are not selected. Grid (any, KV head, row); a warp per segment.
__global__ void __launch_bounds__(kTeamThreads) cap(SelectSketch op, Scratch scratch) {
  wait_for_previous_kernel();
  static_assert(kBins == kTeamThreads);
  const int64_t row = blockIdx.z, list = row * op.kv_heads + blockIdx.y;
  const int thread = threadIdx.x, lane = thread % 32, room = op.selection.max_selected;
  const int merit = kBins - 1 - thread, count = scratch.at_merit[list * kBins + merit];
  int total;
  const int upto = exclusive_scan<kTeamThreads>(count, total) + count;  // candidates of that merit or a higher one
  // The highest merit that a candidate has stays, even if there is not room for all its candidates.
  const bool stays = total <= room || (count > 0 && (upto <= room || upto == count));
  const auto least = static_cast<int>(-largest<kTeamThreads>(stays ? static_cast<float>(-merit) : kNothing));
  if (blockIdx.x == 0) {
    const int left_out = merit < least ? count : merit == least ? max(0, upto - room) : 0;
    const double lost = sum<kTeamThreads>(left_out > 0 ? left_out * sketch::most_weight(merit) : 0.0);
    // A token that is left out may have its merit from one head and be below the floor of another. So every token that
    // is not selected adds most_below to each head's bound.
    const int others = length_of(op, row) - total + sum<kTeamThreads>(left_out);
    for (int h = thread; h < op.group; h += kTeamThreads) {
      const int head = static_cast<int>(blockIdx.y) * op.group + h;
      write_bound(op, row, head, lost + others * sketch::most_below(Entmax<double>(op.alpha.of(head))));
    }
  }
  if (total <= room) return;
  const int seq_len = length_of(op, row), warps = kTeamThreads / 32;
#pragma unroll 1
  for (int segment = static_cast<int>(blockIdx.x) * warps + thread / 32; segment * kSegment < seq_len;
       segment += static_cast<int>(gridDim.x) * warps) {
    uint32_t* candidates = scratch.candidates + (list * scratch.capacity + segment * kSegment) / 32;
    const uint8_t* merits = scratch.merits + list * scratch.capacity + segment * kSegment;
    int kept = 0;
#pragma unroll 1
    for (int word = 0; word < Segment::kWords; ++word) {
      const bool keep = candidates[word] >> lane & 1 && merits[word * 32 + lane] >= least;
      const uint32_t mask = __ballot_sync(kAllLanes, keep);
      if (lane == 0) candidates[word] = mask;
      kept += __popc(mask);
    }
    if (lane == 0) scratch.candidate_counts[list * scratch.segments() + segment] = kept;
  }
}

/// Step 5: a thread lists the tokens of one word of candidate bits. The block also writes -1 to those of 32
/// kTeamThreads places that are behind the end of the list. Grid (words / kTeamThreads, KV head, row).
__global__ void __launch_bounds__(kTeamThreads) list_selected(SelectSketch op, Scratch scratch) {
  wait_for_previous_kernel();
  const int64_t row = blockIdx.z, list = row * op.kv_heads + blockIdx.y;
  const int thread = threadIdx.x, room = op.selection.max_selected;
  const int first_word = static_cast<int>(blockIdx.x) * kTeamThreads, word = first_word + thread;
  const int segments = ceil_div(length_of(op, row), kSegment), words = segments * Segment::kWords;
  if (blockIdx.x == 0 && !scratch.merits) {
    for (int h = thread; h < op.group; h += kTeamThreads) {
      write_bound(op, row, static_cast<int>(blockIdx.y) * op.group + h, 0);
    }
  }
  const int32_t* counts = scratch.candidate_counts + list * scratch.segments();
  int own_before = 0, own = 0;
#pragma unroll 4
  for (int i = thread; i < segments; i += kTeamThreads) {
    own += counts[i];
    if (i < first_word / Segment::kWords) own_before += counts[i];
  }
  const int before = sum<kTeamThreads>(own_before), count = min(sum<kTeamThreads>(own), room);
  uint32_t mask = word < words ? scratch.candidates[list * (scratch.capacity / 32) + word] : 0;
  int total;
  int to = before + exclusive_scan<kTeamThreads>(__popc(mask), total);
  int32_t* selected = op.selection.row(list);
  for (; mask && to < room; mask &= mask - 1, ++to) selected[to] = word * 32 + __ffs(static_cast<int>(mask)) - 1;
  const int end = min((first_word + kTeamThreads) * 32, room);
  for (int place = max(first_word * 32, count) + thread; place < end; place += kTeamThreads) selected[place] = -1;
  if (blockIdx.x == 0 && thread == 0) op.selection.counts[list] = count;
}

}  // namespace

int64_t workspace_bytes(const SelectSketch& op) { return Scratch(op).place(op, nullptr); }

void select_sketch(const SelectSketch& op, void* workspace, cudaStream_t stream) {
  if (op.batch == 0) return;
  const char* name = "select_sketch";
  Scratch scratch(op);
  scratch.place(op, workspace);
  const bool vectors = in_vectors(op.k_pages, op.dtype, op.head_dim);
  if (scratch.merits) {
    check(name, cudaMemsetAsync(scratch.at_merit, 0, int64_t{op.batch} * op.kv_heads * kBins * 4, stream));
  }
  sketch::dispatch_blocks(op.head_dim, [&](auto words) {
    const Grid grid{dim3(kBlocks<words> * multiprocessors()), kScanThreads};
    launch(name, scan<words>, grid, stream, op, scratch);
    dispatch_element(op.dtype, [&](auto element) {
      launch(name, find_floors<decltype(element)>, {dim3(op.q_heads, op.batch), kTeamThreads}, stream, op, scratch,
             vectors);
    });
    const auto refines = [&](auto capped) {
      launch(name, op.fine ? refine<words, true, capped> : refine<words, false, capped>, grid, stream, op, scratch);
    };
    scratch.merits ? refines(std::true_type{}) : refines(std::false_type{});
  });
  const dim3 words(std::max(1, ceil_div(scratch.capacity / 32, kTeamThreads)), op.kv_heads, op.batch);
  if (scratch.merits) launch(name, cap, {words, kTeamThreads}, stream, op, scratch);
  launch(name, list_selected, {words, kTeamThreads}, stream, op, scratch);
}

}  // namespace entmaxkv::cuda
