// select_sketch, step 3: for each token whose bound from plane 0 is above the floor of some head, plane 1 tightens the
// bound. If it is still above the floor, the token's candidate bit is set, and, if there is a cap, its merit.
#pragma once

#include "../common/work_split.cuh"
#include "scratch.cuh"

namespace entmaxkv::cuda::sketch_selection {

/// What `refine` needs to know about a query head.
struct RefinedHead {
  float floor, slope;
  sketch::Worth worth;

  /// Returns the h-th of `heads`. If there are fewer heads, the floor is infinite, so there are no candidates.
  static __device__ RefinedHead of(const SelectSketch& op, const Scratch& scratch, const CodeHeads& heads, int h) {
    const int head = heads.first + min(h, heads.count - 1);
    return {h < heads.count ? scratch.floors[heads.row * op.q_heads + head] : -kNothing,
            sketch::upward(op.scoring.slope(head)), sketch::Worth(Entmax<double>(op.alpha.of(head)))};
  }
};

/// A warp's tile of tokens: bounds from plane 0, and plane 1 of the candidates of some head.
template <int kWords>
struct Fine {
  uint32_t words[4][2][kWords];
  uint32_t scales, coarse, fine;
  uint2 uppers[2];      // bounds of this lane's four tokens, for its two heads
  uint32_t candidates;  // bit i: whether this lane's token i is above a floor of some head

  /// Loads the bounds that `scan` has written of kTokens tokens from `first` on. All lanes call.
  static __device__ void load_uppers(uint2 (&to)[2], const __half* uppers, int64_t stride, int heads, int first) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int h = min(Lane<kWords>::head(j), heads - 1);
      to[j] = __ldg(reinterpret_cast<const uint2*>(uppers + h * stride + first + 4 * Lane<kWords>::own_row()));
    }
  }

  /// Returns the nth of four bounds.
  static __device__ float upper_of(const uint2& word, int nth) {
    return __half2float(reinterpret_cast<const __half*>(&word)[nth]);
  }

  /// Sets `candidates` from the bounds, and loads plane 1 and the norms of these tokens. All lanes call.
  template <bool kFine>
  __device__ void load(const SketchPages<kWords>& pages, const uint2 (&its_uppers)[2], const RefinedHead* heads,
                       int first, int end) {
    const int own = first + 4 * Lane<kWords>::own_row();
    candidates = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uppers[j] = its_uppers[j];
#pragma unroll
      for (int i = 0; i < 4; ++i) candidates |= static_cast<uint32_t>(!(upper_of(uppers[j], i) <= heads[j].floor)) << i;
    }
    candidates &= own < end ? (1u << min(4, end - own)) - 1 : 0;
    candidates |= __shfl_xor_sync(kAllLanes, candidates, 1);
    const uint32_t other = __shfl_xor_sync(kAllLanes, candidates, 2);
    if (!kFine || __ballot_sync(kAllLanes, candidates != 0) == 0) return;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t of_row = (Lane<kWords>::part() / 2 == w) ? candidates : other;
      const int token = first + 4 * Lane<kWords>::row(w);
      const uint32_t page = of_row ? pages.page(token) : 0;
      const uint8_t* codes = pages.codes_of(page, token, 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (of_row >> i & 1) load_words<kWords>(words[i][w], codes + i * pages.kRowBytes);
      }
      if (Lane<kWords>::part() / 2 == w && of_row) {
        scales = pages.norms_of(page, token, 0);
        coarse = pages.norms_of(page, token, 1);
        fine = pages.norms_of(page, token, 2);
      }
    }
  }
};

/// The candidate bits and merits of a warp's segment, in shared memory, all 0 at first.
struct Segment {
  static constexpr int kWords = kSegment / 32;
  uint32_t candidates[kWords];
  uint8_t merits[kSegment];

  /// Merges the candidates of one part of a group's heads into those of earlier parts in `scratch`, and clears this.
  /// With the last part, also writes the counts. All lanes call.
  __device__ void finish(const Scratch& scratch, int64_t list, int segment, bool first_part, bool last_part) {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    const int64_t at = list * scratch.capacity + segment * kSegment;
    uint32_t mask = 0;
    if (lane < kWords) {
      uint32_t& all = scratch.candidates[at / 32 + lane];
      all = mask = first_part ? candidates[lane] : candidates[lane] | all;
      candidates[lane] = 0;
    }
    if (last_part) {
      const int count = __reduce_add_sync(kAllLanes, __popc(mask));
      if (lane == 0) scratch.candidate_counts[list * scratch.segments() + segment] = count;
    }
    if (scratch.merits) {
#pragma unroll 1
      for (int word = 0; word < kWords; ++word) {
        uint8_t& all = scratch.merits[at + word * 32 + lane];
        uint8_t& own = merits[word * 32 + lane];
        all = first_part ? own : max(own, all);
        own = 0;
        if (last_part && __shfl_sync(kAllLanes, mask, word) >> lane & 1) {
          atomicAdd(scratch.at_merit + list * kBins + all, 1);
        }
      }
    }
    __syncwarp();
  }
};

/// Finds the candidates of one part of a group's heads in every kScanWarps-th segment of tokens begin ... stop - 1. All
/// lanes call, with the warp's own segment s.
template <int kWords, bool kFine, bool kCapped>
__device__ void refine_segments(const SelectSketch& op, const Scratch& scratch, const SketchPages<kWords>& pages,
                                const CodeHeads& heads, const Numbers& s_numbers, const RefinedHead (&s_heads)[kHeads],
                                Segment& s, int begin, int stop, int part) {
  const auto after = [](int first) {
    const int next = first + kTokens;
    return next % kSegment ? next : next + (kScanWarps - 1) * kSegment;
  };
  const Lane<kWords> lane(s_numbers);
  const int last = length_of(op, heads.row) - 1;
  const __half* all_uppers = scratch.uppers + (heads.row * op.q_heads + heads.first) * scratch.capacity;
  const RefinedHead* own_heads = s_heads + lane.head(0);
  if (begin >= stop) return;
  uint2 uppers[2];
  Fine<kWords>::load_uppers(uppers, all_uppers, scratch.capacity, heads.count, begin);
  Fine<kWords> next;
  next.template load<kFine>(pages, uppers, own_heads, begin, stop);
  if (after(begin) < stop) {
    Fine<kWords>::load_uppers(uppers, all_uppers, scratch.capacity, heads.count, after(begin));
  }
#pragma unroll 1
  for (int first = begin; first < stop; first = after(first)) {
    const Fine<kWords> tile = next;
    const int second = after(first), third = after(second);
    if (second < stop) next.template load<kFine>(pages, uppers, own_heads, second, stop);
    if (third < stop) Fine<kWords>::load_uppers(uppers, all_uppers, scratch.capacity, heads.count, third);
    if (__ballot_sync(kAllLanes, tile.candidates != 0) != 0) {
      const auto distance = static_cast<float>(first + 4 * lane.own_row() - last);
      const float floors[2] = {own_heads[0].floor, own_heads[1].floor};
      uint32_t candidates = 0;
      float worth[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float bounds[2] = {tile.upper_of(tile.uppers[0], i), tile.upper_of(tile.uppers[1], i)};
        if constexpr (kFine) {
          int products[2];
          lane.multiply(tile.words[i], products);
          const float step = sketch::step_of(byte_of(tile.scales, i));
          const float coarse = byte_of(tile.coarse, i), fine = byte_of(tile.fine, i);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float bias = own_heads[j].slope * (distance + static_cast<float>(i));
            const sketch::QueryCode& code = s_numbers.codes[lane.head(j)];
            bounds[j] = fminf(bounds[j], code.refined(bounds[j], products[j], step, coarse, fine, bias));
          }
        }
        candidates |= static_cast<uint32_t>(!(bounds[0] <= floors[0]) || !(bounds[1] <= floors[1])) << i;
        if (kCapped) {
          worth[i] = larger(own_heads[0].worth.of(bounds[0] - floors[0]), own_heads[1].worth.of(bounds[1] - floors[1]));
        }
      }
      candidates &= tile.candidates;
      candidates |= __shfl_xor_sync(kAllLanes, candidates, 1);
      const int row = lane.own_row() % 8;
      const bool writes = lane.part() % 2 == 0;
      if (kCapped) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          worth[i] = larger(worth[i], __shfl_xor_sync(kAllLanes, worth[i], 1));
          if (writes && candidates >> i & 1) {
            s.merits[first % kSegment + 4 * lane.own_row() + i] = static_cast<uint8_t>(sketch::merit_of(worth[i]));
          }
        }
      }
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const bool own = writes && lane.part() / 2 == w;
        const uint32_t word = __reduce_or_sync(kAllLanes, own ? candidates << 4 * row : 0);
        if (threadIdx.x % 32 == 0) s.candidates[first % kSegment / 32 + w] = word;
      }
    }
    if (second >= stop || second / kSegment != first / kSegment) {
      s.finish(scratch, heads.row * op.kv_heads + heads.kv_head, first / kSegment, part == 0,
               part == CodeHeads::parts(op) - 1);
    }
  }
}

template <int kWords, bool kFine, bool kCapped>
__global__ void __launch_bounds__(kScanThreads, kOccupancy<kWords> - (kCapped && kOccupancy<kWords> > 1))
    refine(SelectSketch op, Scratch scratch) {
  wait_for_previous_kernel();
  __shared__ Numbers s_numbers;
  __shared__ Segment s_segments[kScanWarps];
  __shared__ RefinedHead s_heads[kHeads];
  const int thread = threadIdx.x;
  Segment& s = s_segments[thread / 32];
  for (int i = thread % 32; i < kSegment; i += 32) s.candidates[i % Segment::kWords] = s.merits[i] = 0;
  const auto units_of = [&](int list) { return ceil_div(length_of(op, list / op.kv_heads), kScanWarps * kSegment); };
  WorkSplit::of_block<kScanThreads>(op.batch * op.kv_heads, units_of)
      .visit(units_of, [&](int list, int unit, int of_list) {
        const int64_t row = list / op.kv_heads;
        const int kv_head = list % op.kv_heads;
        const int begin = (unit * kScanWarps + thread / 32) * kSegment;
        const int stop = min(length_of(op, row), (unit + of_list) * kScanWarps * kSegment);
        const SketchPages<kWords> pages(op, row, kv_head);
#pragma unroll 1
        for (int part = 0; part < CodeHeads::parts(op); ++part) {
          const CodeHeads heads(op, row, kv_head, part);
          s_numbers.set(op, heads);
          if (thread < kHeads) s_heads[thread] = RefinedHead::of(op, scratch, heads, thread);
          __syncthreads();
          refine_segments<kWords, kFine, kCapped>(op, scratch, pages, heads, s_numbers, s_heads, s, begin, stop, part);
        }
      });
}

}  // namespace entmaxkv::cuda::sketch_selection
