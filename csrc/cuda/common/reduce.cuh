// Reductions and scans over the threads of a block.
#pragma once

#include "element.cuh"

namespace entmaxkv::cuda {

/// A float as an unsigned number of the same order, NaN above all.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return ~0u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float from_ordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/// Of a number, or of a struct of words.
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

/// The combination of the values of kBlockThreads threads, a block or a warp, in a fixed order, for each of them.
/// They all call.
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

template <int kBlockThreads, typename Value>
__device__ Value sum(Value value) {
  return reduce<kBlockThreads>(value, [](Value a, Value b) { return a + b; });
}

/// The larger of two values, NaN if either is.
__device__ inline float larger(float a, float b) {
#ifdef EMULATE_CUDA
  return a != a || a > b ? a : b;
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}

/// The largest of all threads' values, NaN if any is.
template <int kBlockThreads>
__device__ float largest(float value) {
  return reduce<kBlockThreads>(value, [](float a, float b) { return larger(a, b); });
}

/// The sum over the lanes up to this one. All lanes call.
template <typename Number>
__device__ Number sum_upto(Number value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Number other = __shfl_up_sync(kAllLanes, value, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) value += other;
  }
  return value;
}

/// The sum over all threads before this one, and in `total` over all. All threads call.
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

/// Where the wanted ones of a block's items go, one behind the other: item i of thread t is the (i kBlockThreads +
/// t)-th.
template <int kBlockThreads, int kItems>
struct Places {
  int place[kItems];  // of those that are wanted
  int count;          // of all threads

  /// All threads call.
  __device__ explicit Places(const bool (&wanted)[kItems]) {
    constexpr int kWarps = kBlockThreads / 32;
    static_assert(kItems * kWarps <= kBlockThreads);
    __shared__ int s_before[kItems * kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t masks[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) masks[i] = __ballot_sync(kAllLanes, wanted[i]);
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
