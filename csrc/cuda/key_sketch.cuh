// Rotated queries and the codes of keys (sketch.h).
#pragma once

#include "../sketch.h"
#include "tile.cuh"

namespace entmaxkv::cuda {

/// A query, rotated: a lane has dimensions lane, 32 + lane, ... All lanes call every function.
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
};

/// Codes keys, kKeys of a warp at once: a lane has 16 successive coordinates of one of them, which are those of one
/// `nth` of sketch::coordinate. kLanes lanes have a key. All lanes call every function.
template <int kLanes>
class KeyCoder {
 public:
  static constexpr int kKeys = 32 / kLanes;

  __device__ KeyCoder(int head_dim, bool vectors)
      : head_dim_(head_dim), dims_(sketch::dims_of(head_dim)), vectors_(vectors) {
#pragma unroll
    for (int i = 0; i < kOwn * kLanes / 32; ++i) {
      const uint32_t signs = __ballot_sync(kAllLanes, sketch::sign_of(32 * i + static_cast<int>(threadIdx.x % 32)) < 0);
      if (own() / 2 == i) signs_ = signs >> own() % 2 * 16;
    }
  }

  /// Which of the keys this lane has a part of.
  static __device__ int nth() { return static_cast<int>(threadIdx.x % 32) / kLanes; }

  /// Codes this lane's key for a slot of a page, or none, where key is null; page_head = page * kv_heads + kv_head.
  template <typename T>
  __device__ void code(const Sketch& to, const T* key, int64_t page_head, int page_size, int slot) const {
    float x[kOwn];
    load(key, x);
    rotate(x);
    float square = 0;
#pragma unroll
    for (const float each : x) square = fmaf(each, each, square);
    const float norm = sqrtf(over_key(square, [](float a, float b) { return a + b; }));
    using sketch::Distances;
    float codes[kOwn];
    sketch::Norms norms(sketch::kUnknown, 0, {}, dims_);
    int scale = sketch::scale_of(sketch::kSpread * norm * per_root_, false);
#pragma unroll
    for (int attempt = 0; attempt < 2; ++attempt) {
      const float per_step = sketch::steps_of(scale);
      Distances squares;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        codes[i] = sketch::code_of(x[i] * per_step);
        squares.add(x[i] * per_step, codes[i]);
      }
      if (kOwn * own() >= dims_) squares = {};
      squares = over_key(squares, [](const Distances& a, const Distances& b) { return a + b; });
      norms = {scale, norm, squares, dims_};
      if (attempt > 0 || __ballot_sync(kAllLanes, !norms.fits()) == 0) break;
      float largest = 0;
#pragma unroll
      for (const float each : x) largest = larger(largest, fabsf(each));
      largest = over_key(largest, [](float a, float b) { return larger(a, b); });
      if (!norms.fits()) scale = sketch::scale_of(largest / 2, true);
    }
    const bool fits = norms.fits();
    if (!fits) norms.scale = norms.coarse = norms.fine = sketch::kUnknown;
    uint32_t words[kOwn / 4] = {};  // of codes, a byte each
#pragma unroll
    for (int i = 0; i < kOwn; ++i) words[i / 4] |= (fits ? sketch::bits_of(codes[i]) : 0) << i % 4 * 8;
    const int block = own() / 4, part = own() % 4, row_bytes = dims_ / 4;
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      uint32_t bits[kOwn / 4];
#pragma unroll
      for (int i = 0; i < kOwn / 4; ++i) bits[i] = (words[i] >> (plane ? 0 : 2) & 0x03030303u) << 2 * part;
      const uint32_t word = gather(bits, part);
      if (key && 16 * own() < dims_) {
        uint8_t* row = to.plane(page_head, plane, page_size, row_bytes) + slot * row_bytes;
        *reinterpret_cast<uint32_t*>(row + 16 * block + 4 * part) = word;
      }
    }
    if (key && own() < 3) {
      to.norm(page_head, own(), page_size)[slot] = static_cast<uint8_t>(own() == 0   ? norms.scale
                                                                        : own() == 1 ? norms.coarse
                                                                                     : norms.fine);
    }
  }

 private:
  static constexpr int kOwn = 16;

  static __device__ int own() { return threadIdx.x % kLanes; }

  template <typename T>
  __device__ void load(const T* key, float (&x)[kOwn]) const {
    constexpr int kCount = 16 / sizeof(T);
#pragma unroll
    for (float& each : x) each = 0;
    if (key && vectors_) {
#pragma unroll
      for (int i = 0; i < kOwn; i += kCount) {
        float elements[kCount];
        unpack<T>(load_word<true>(key, own() * kOwn + i, head_dim_), elements);
#pragma unroll
        for (int e = 0; e < kCount; ++e) x[i + e] = elements[e];
      }
    } else if (key) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (own() * kOwn + i < head_dim_) x[i] = to_float(key[own() * kOwn + i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] = __uint_as_float(__float_as_uint(x[i]) ^ (signs_ >> i & 1) << 31);
  }

  __device__ void rotate(float (&x)[kOwn]) const {
#pragma unroll
    for (int step = 1; step < kOwn; step *= 2) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (i & step) continue;
        const float sum = x[i] + x[i | step];
        x[i | step] = x[i] - x[i | step];
        x[i] = sum;
      }
    }
    const int rotation = sketch::rotation_of(dims_);
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const float sign = own() & distance ? -1 : 1;
      if (kOwn * distance >= rotation) continue;
#pragma unroll
      for (float& each : x) each = fmaf(sign, each, __shfl_xor_sync(kAllLanes, each, distance));
    }
    const float scale = rotation == 64 ? 0.125f : rotation == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (float& each : x) each *= scale;
  }

  /// The combination of the lanes' values of a key, for each of them.
  template <typename Value, typename Combine>
  static __device__ Value over_key(Value value, Combine combine) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) value = combine(value, shuffle_xor(value, distance));
    return value;
  }

  /// Of four words of four lanes' bits, the one that is this lane's part.
  static __device__ uint32_t gather(const uint32_t (&bits)[4], int part) {
    const bool upper = part >= 2, odd = part % 2;
    uint32_t keep[2], give[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      keep[i] = upper ? bits[2 + i] : bits[i];
      give[i] = upper ? bits[i] : bits[2 + i];
      keep[i] |= __shfl_xor_sync(kAllLanes, give[i], 2);
    }
    return (odd ? keep[1] : keep[0]) | __shfl_xor_sync(kAllLanes, odd ? keep[0] : keep[1], 1);
  }

  int head_dim_, dims_;
  float per_root_ = 1 / sqrtf(static_cast<float>(dims_));
  bool vectors_;
  uint32_t signs_ = 0;
};

/// Calls body with the lanes that a key takes.
template <typename Body>
__device__ void dispatch_lanes(int head_dim, Body body) {
  if (head_dim <= 64) return body(std::integral_constant<int, 4>{});
  if (head_dim <= 128) return body(std::integral_constant<int, 8>{});
  return body(std::integral_constant<int, 16>{});
}

/// Codes the new keys of an append, which has yet to happen.
void sketch_new_keys(const AppendKv& op, cudaStream_t stream);

}  // namespace entmaxkv::cuda
