// Reductions and scans over the threads of a warp or a block.
#pragma once

#include "element.cuh"

namespace entmaxkv::cuda {

/// Maps floats to unsigned numbers that compare in the same order. NaN maps to the largest. No float maps to 0.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return ~0u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// Returns the float that ordered() maps to `key`.
__device__ inline float from_ordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/// __shfl_xor_sync for a number or a struct of 4-byte words. All lanes call.
template <typename Value>
__device__ Value shuffle_xor(Value value, int distance) {
  constexpr int kWords = sizeof(Value) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(Value));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, distance);
  memcpy(&value, words, sizeof(Value));
  return value;
}

/// Combines the values of kBlockThreads threads, a whole block or a warp (32), in a fixed order. All these threads call
/// and all get the result.
template <int kBlockThreads, typename Value, typename Combine>
__device__ Value reduce(Value value, Combine combine) {
  constexpr int kWarps = kBlockThreads / 32;
  static_assert(32 % kWarps == 0);
  __shared__ Value s_values[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
  if (kWarps == 1) return value;
  __syncthreads();  // the values of an earlier call have been read
  if (lane == 0) s_values[warp] = value;
  __syncthreads();
  value = s_values[lane % kWarps];
#pragma unroll
  for (int distance = kWarps / 2; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
  return value;
}

/// Returns the sum of all threads' values, as reduce does.
template <int kBlockThreads, typename Value>
__device__ Value sum(Value value) {
  return reduce<kBlockThreads>(value, [](Value a, Value b) { return a + b; });
}

/// Returns the larger of two values, NaN if either is NaN.
__device__ inline float larger(float a, float b) {
#ifdef EMULATE_CUDA
  return a != a || a > b ? a : b;
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}

/// Returns the largest of all threads' values, NaN if any is NaN. Calls and results as for reduce.
template <int kBlockThreads>
__device__ float largest(float value) {
  return reduce<kBlockThreads>(value, [](float a, float b) { return larger(a, b); });
}

/// Returns the sum of the values of lanes 0 ... this lane. All lanes call.
template <typename Number>
__device__ Number sum_upto(Number value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Number other = __shfl_up_sync(kAllLanes, value, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) value += other;
  }
  return value;
}

/// Returns the sum of the values of all threads before this one, and sets `total` to the sum of all. All threads of the
/// block call.
template <int kBlockThreads, typename Number>
__device__ Number exclusive_scan(Number value, Number& total) {
  constexpr int kWarps = kBlockThreads / 32;
  __shared__ Number s_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Number upto = sum_upto(value);
  __syncthreads();  // the sums of an earlier call have been read
  if (lane == 31) s_sums[warp] = upto;
  __syncthreads();
  const Number of_warp = lane < kWarps ? s_sums[lane] : 0;
  const Number upto_warp = sum_upto(of_warp);
  total = __shfl_sync(kAllLanes, upto_warp, 31);
  return __shfl_sync(kAllLanes, upto_warp - of_warp, warp) + upto - value;
}

/// Stream compaction: each thread has kItems items and says which of them to keep. The kept items of the block get the
/// places 0, 1, ... in the order of i kBlockThreads + t, where item i belongs to thread t.
template <int kBlockThreads, int kItems>
struct Places {
  int place[kItems];  // place[i]: place of this thread's item i, valid if it is kept
  int count;          // kept items of the block

  /// All threads of the block call.
  __device__ explicit Places(const bool (&keep)[kItems]) {
    constexpr int kWarps = kBlockThreads / 32;
    static_assert(kItems * kWarps <= kBlockThreads);
    __shared__ int s_before[kItems * kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t masks[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) masks[i] = __ballot_sync(kAllLanes, keep[i]);
    __syncthreads();  // the places of an earlier call have been read
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (lane == 0) s_before[i * kWarps + warp] = __popc(masks[i]);
    }
    __syncthreads();
    const bool counts = threadIdx.x < kItems * kWarps;
    const int before = exclusive_scan<kBlockThreads>(counts ? s_before[threadIdx.x] : 0, count);
    if (counts) s_before[threadIdx.x] = before;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      place[i] = s_before[i * kWarps + warp] + __popc(masks[i] & ((1u << lane) - 1));
    }
  }
};

}  // namespace entmaxkv::cuda
