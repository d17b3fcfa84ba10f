// A warp rotates a key or a query, and codes a key (sketch.h).
#pragma once

#include "../sketch.h"
#include "device.cuh"

namespace entmaxkv::cuda {

/// A row, rotated: a lane has dimensions lane, 32 + lane, ... All lanes call every function.
struct Rotated {
  static constexpr int kOwn = sketch::kMaxDims / 32;
  float of[kOwn];

  template <typename T>
  __device__ Rotated(const T* row, int head_dim, float factor) {
    const int lane = threadIdx.x % 32, dims = sketch::dims_of(head_dim), rotation = sketch::rotation_of(dims);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int d = 32 * i + lane;
      of[i] = d < head_dim ? to_float(row[d]) * (factor * sketch::sign_of(d)) : 0.0f;
    }
#pragma unroll
    for (int step = 1; step < kOwn; step *= 2) {
      if (32 * step >= rotation) break;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (i & step) continue;
        const float sum = of[i] + of[i | step];
        of[i | step] = of[i] - of[i | step];
        of[i] = sum;
      }
    }
    const float scale = 1 / sqrtf(static_cast<float>(rotation));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (32 * i >= dims) break;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, of[i], distance);
        of[i] = lane & distance ? other - of[i] : of[i] + other;
      }
      of[i] *= scale;
    }
  }

  __device__ float norm() const {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) squares = fmaf(of[i], of[i], squares);
    return sqrtf(sum<32>(squares));
  }

  /// NaN if some coordinate is.
  __device__ float largest() const {
    float most = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) most = larger(most, fabsf(of[i]));
    return cuda::largest<32>(most);
  }

  __device__ sketch::Norms norms_at(int scale, float norm, int dims) const {
    const float per_step = 1 / sketch::step_of(scale);
    sketch::Distances own;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (32 * i < dims) own.add(of[i] * per_step);
    }
    return {scale, norm, sum<32>(own), dims};
  }
};

/// Codes a key for a slot of a page; page_head = page * kv_heads + kv_head. All lanes of a warp call.
template <typename T>
__device__ void sketch_key(const Sketch& to, const T* key, int head_dim, int64_t page_head, int page_size, int slot) {
  const int lane = threadIdx.x % 32, dims = sketch::dims_of(head_dim), row_bytes = dims / 4;
  const Rotated r(key, head_dim, 1);
  const float norm = r.norm();
  sketch::Norms norms =
      r.norms_at(sketch::scale_of(sketch::kSpread * norm / sqrtf(static_cast<float>(dims)), false), norm, dims);
  if (!norms.fits()) norms = r.norms_at(sketch::scale_of(r.largest() / 2, true), norm, dims);
  if (!norms.fits()) norms.scale = norms.coarse = norms.fine = sketch::kUnknown;
  const float per_step = 1 / sketch::step_of(norms.scale);
  uint8_t* plane = to.plane(page_head, lane / 16, page_size, row_bytes) + slot * row_bytes + lane % 16;
#pragma unroll
  for (int i = 0; i < Rotated::kOwn; i += 2) {
    if (32 * i >= dims) break;
    // Of coordinates 16 nth + byte of the block, this lane has two nth, lane ^ 16 the others.
    const int first = sketch::code_of(r.of[i] * per_step), second = sketch::code_of(r.of[i + 1] * per_step);
    const int shift = lane / 16 * 2;
    int bits = (first >> 2 | second >> 2 << 4 | (first & 3) << 8 | (second & 3) << 12) << shift;
    bits |= __shfl_xor_sync(kAllLanes, bits, 16);
    plane[i / 2 * 16] = static_cast<uint8_t>(bits >> lane / 16 * 8);
  }
  if (lane < 3) {
    to.norm(page_head, lane, page_size)[slot] = static_cast<uint8_t>(lane == 0   ? norms.scale
                                                                     : lane == 1 ? norms.coarse
                                                                                 : norms.fine);
  }
}

}  // namespace entmaxkv::cuda
