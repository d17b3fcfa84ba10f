// select_sketch, step 2: the floor of a query head, from the exact scores of the chunks' best tokens (scratch.cuh).
#pragma once

#include "../common/ring.cuh"
#include "../sparse_decode/weights.cuh"
#include "scratch.cuh"

namespace entmaxkv::cuda::sketch_selection {

/// Sets s_tokens to the kExact / kClasses tokens with the highest bounds of each class among the chunks' best tokens,
/// or to -1 where there are no more. All threads call; the caller must add a barrier.
__device__ inline void choose_exact(const Scratch& scratch, int64_t row_head, int chunks,
                                    int (&s_tokens)[sketch::kExact]) {
  constexpr int kOfClass = sketch::kExact / kClasses, kOwn = kMostChunks / 32;
  static_assert(kClasses == kTeamThreads / 32);
  const int lane = threadIdx.x % 32, its_class = threadIdx.x / 32;
  const Best* bests = scratch.bests_of(row_head, its_class);
  Best own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (i * 32 + lane < chunks) own[i] = bests[i * 32 + lane];
  }
#pragma unroll 1
  for (int n = 0; n < kOfClass; ++n) {
    Best best;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) best.take(own[i]);
    const uint32_t highest = __reduce_max_sync(kAllLanes, best.token < 0 ? 0 : ordered(best.upper));
    const uint32_t have = __ballot_sync(kAllLanes, best.token >= 0 && ordered(best.upper) == highest);
    const int chosen = have ? __shfl_sync(kAllLanes, best.token, __ffs(static_cast<int>(have)) - 1) : -1;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (own[i].token == chosen) own[i] = {};
    }
    if (lane == 0) s_tokens[its_class * kOfClass + n] = chosen;
  }
}

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, 2) find_floors(SelectSketch op, Scratch scratch, bool vectors) {
  wait_for_previous_kernel();
  constexpr int kLanes = 8, kCount = 16 / sizeof(T);            // lanes per key, elements of a word
  constexpr int kOwn = sketch::kExact * kLanes / kTeamThreads;  // keys that a thread works for
  __shared__ float s_q[kMaxHeadDim];
  __shared__ int s_tokens[sketch::kExact];
  __shared__ float s_scores[sketch::kExact];
  const int64_t row = blockIdx.y, at = row * op.q_heads + blockIdx.x;
  const int head = blockIdx.x, kv_head = head / op.group, thread = threadIdx.x;
  const int seq_len = length_of(op, row);
  const Entmax<double> entmax(op.alpha.of(head));
  if (seq_len == 0 || (entmax.is_softmax() && seq_len <= op.selection.max_selected)) {
    if (thread == 0) scratch.floors[at] = kNothing;
    return;
  }
  float own_square = 0;
  for (int d = thread; d < kMaxHeadDim; d += kTeamThreads) {
    s_q[d] = d < op.head_dim ? op.scoring.scale * to_float(op.q.at<T>(row, head)[d]) : 0;
    own_square += s_q[d] * s_q[d];
  }
  choose_exact(scratch, at, ceil_div(seq_len, chunk_of(seq_len)), s_tokens);
  const float q_norm = sqrtf(sum<kTeamThreads>(own_square));  // its barrier also orders s_q and s_tokens
  const float slope = op.scoring.slope(head);
  const T* keys[kOwn];
  int tokens[kOwn];
  float products[kOwn] = {}, squares[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int page_bits = log2_of(op.page_size);
    const int token = tokens[i] = s_tokens[i * (kTeamThreads / kLanes) + thread / kLanes];
    keys[i] = op.k_pages.at<T>(op.page_table.row(row)[max(token, 0) >> page_bits], kv_head,
                               max(token, 0) & (op.page_size - 1));
  }
#pragma unroll 2
  for (int d = thread % kLanes * kCount; d < op.head_dim; d += kLanes * kCount) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float elements[kCount];
      unpack<T>(vectors ? load_word<true>(keys[i], d, op.head_dim) : load_word<false>(keys[i], d, op.head_dim),
                elements);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        products[i] = fmaf(elements[e], s_q[d + e], products[i]);
        squares[i] = fmaf(elements[e], elements[e], squares[i]);
      }
    }
  }
  float scores[kOwn], best = kNothing;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      products[i] += __shfl_xor_sync(kAllLanes, products[i], distance);
      squares[i] += __shfl_xor_sync(kAllLanes, squares[i], distance);
    }
    scores[i] = tokens[i] < 0 ? kNothing : products[i] + slope * static_cast<float>(tokens[i] - (seq_len - 1));
    best = larger(best, scores[i]);
  }
  best = largest<kTeamThreads>(best);
  float floor = kNothing;
  if (best > kNothing && best < -kNothing) {
    const float depth = entmax.is_softmax() ? sketch::kBelow : static_cast<float>(entmax.beta);
    const float origin = entmax.is_softmax() ? kNothing : best - depth * (1 + 0x1p-20f);
    float most_square = 0;  // largest squared norm of the keys that the threshold depends on
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (scores[i] > origin) most_square = fmaxf(most_square, squares[i]);
      if (thread % kLanes == 0) s_scores[i * (kTeamThreads / kLanes) + thread / kLanes] = scores[i];
    }
    most_square = largest<kTeamThreads>(most_square);  // its barrier also orders s_scores
    double found;
    if (entmax.is_softmax()) {
      found = best + logf(sum<kTeamThreads>(thread < sketch::kExact ? expf(s_scores[thread] - best) : 0)) - depth;
    } else {
      const bool is_near[] = {thread < sketch::kExact && s_scores[thread] > origin};
      const float own = is_near[0] ? s_scores[thread] : kNothing;
      const Places<kTeamThreads, 1> to(is_near);  // its barrier orders the reads before the writes
      if (is_near[0]) s_scores[to.place[0]] = own;
      __syncthreads();
      found = find_weights(entmax, {s_scores, to.count, origin, 0}).least_score();
    }
    const double rounding = 0x1p-15 * q_norm * sqrtf(most_square) +
                            0x1p-18 * (fabs(found) + fabsf(best) + depth + fabsf(slope) * static_cast<float>(seq_len));
    floor = nextafterf(static_cast<float>(found - rounding), kNothing);
    if (floor != floor) floor = kNothing;
  }
  if (thread == 0) scratch.floors[at] = floor;
}

}  // namespace entmaxkv::cuda::sketch_selection
