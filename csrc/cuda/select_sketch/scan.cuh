// select_sketch, step 1: a warp bounds the scores of a chunk of tokens by plane 0 of their codes. It writes the bounds,
// and the token with the highest bound of each class of the chunk.
#pragma once

#include "../common/work_split.cuh"
#include "scratch.cuh"

namespace entmaxkv::cuda::sketch_selection {

template <int kWords>
__global__ void __launch_bounds__(kScanThreads, kOccupancy<kWords>) scan(SelectSketch op, Scratch scratch) {
  wait_for_previous_kernel();
  __shared__ Numbers s_numbers;
  const int parts = CodeHeads::parts(op), lists = op.batch * op.kv_heads * parts;
  const auto chunks_of = [&](int list) {
    const int seq_len = length_of(op, list / (op.kv_heads * parts));
    return ceil_div(seq_len, chunk_of(seq_len));
  };
  const auto units_of = [&](int list) { return ceil_div(chunks_of(list), kScanWarps); };
  WorkSplit::of_block<kScanThreads>(lists, units_of).visit(units_of, [&](int list, int unit, int of_list) {
    const CodeHeads heads(op, list / (op.kv_heads * parts), list / parts % op.kv_heads, list % parts);
    s_numbers.set(op, heads);
    const Lane<kWords> lane(s_numbers);
    const SketchPages<kWords> pages(op, heads.row, heads.kv_head);
    const int seq_len = length_of(op, heads.row), chunk = chunk_of(seq_len), last = seq_len - 1;
    const int64_t first_head = heads.row * op.q_heads + heads.first;
    const sketch::QueryCode codes[2] = {s_numbers.codes[lane.head(0)], s_numbers.codes[lane.head(1)]};
    const float slopes[2] = {sketch::upward(heads.slope(op, lane.head(0))),
                             sketch::upward(heads.slope(op, lane.head(1)))};
    const int chunks = min((unit + of_list) * kScanWarps, chunks_of(list));
    int nth = unit * kScanWarps + static_cast<int>(threadIdx.x / 32);
    Coarse<kWords> next;
    if (nth < chunks) next.load(pages, nth * chunk, last);
#pragma unroll 1
    for (; nth < chunks; nth += kScanWarps) {
      const int end = nth * chunk + min(chunk, seq_len - nth * chunk);
      Best bests[2];
#pragma unroll 1
      for (int first = nth * chunk; first < end; first += kTokens) {
        const Coarse<kWords> coarse = next;
        if (first + kTokens < end) {
          next.load(pages, first + kTokens, last);
        } else if (nth + kScanWarps < chunks) {
          next.load(pages, (nth + kScanWarps) * chunk, last);
        }
        const int own = first + 4 * lane.own_row();
        const auto distance = static_cast<float>(own - last);
        float bounds[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int products[2];
          lane.multiply(coarse.words[i], products);
          const float scale = byte_of(coarse.scales, i), step = sketch::step_of(scale);
          const float lost = sketch::distance_of(scale, byte_of(coarse.norms, i));
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            bounds[j][i] =
                codes[j].coarse_bound(products[j], step, lost) + slopes[j] * (distance + static_cast<float>(i));
          }
        }
        alignas(8) __half uppers[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uppers[j][i] = __float2half_ru(bounds[j][i]);
            if (own + i < end && bounds[j][i] > bests[j].upper) bests[j] = {bounds[j][i], own + i};
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (lane.head(j) < heads.count && own < end) {
            auto* to = scratch.uppers + (first_head + lane.head(j)) * scratch.capacity + own;
            *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(uppers[j]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        bests[j].take(shuffle_xor(bests[j], 2));  // rows that are 8 apart
        if (lane.part() < 2 && lane.head(j) < heads.count) {
          scratch.bests_of(first_head + lane.head(j), lane.row(0))[nth] = bests[j];
        }
      }
    }
  });
}

}  // namespace entmaxkv::cuda::sketch_selection
