// What the CUDA kernels share: element types, launches, and the reductions and scans of a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../entmax.h"
#include "../ops.h"

namespace entmaxkv::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kNothing = -__builtin_huge_valf();
constexpr float kUndefined = __builtin_nanf("");

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Calls body with a value of the C++ type that `dtype` names.
template <typename Body>
void dispatch_element(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat16:
      return body(__half{});
    case Dtype::kBFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(float{});
  }
}

/// A failure surfaces at the op that caused it, with its name.
inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("entmaxkv::") + op + ": kernel launch failed: " + cudaGetErrorString(error));
  }
}

template <typename... Params>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream,
            std::common_type_t<Params>... params) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.stream = stream;
  check(op, cudaLaunchKernelEx(&config, kernel, params...));
}

/// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Tokens of a row, whatever seq_lens says: never more than its page table has room for.
template <typename Op>
__device__ int length_of(const Op& op, int64_t row) {
  return max(0, min(op.seq_lens[row], op.max_pages * op.page_size));
}

/// A float as an unsigned number of the same order, NaN above all.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return ~0u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float from_ordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

template <typename Value>
__device__ Value shuffle_xor(Value value, int distance) {
  return __shfl_xor_sync(kAllLanes, value, distance);
}

template <typename Real>
__device__ Excess<Real> shuffle_xor(const Excess<Real>& excess, int distance) {
  return {shuffle_xor(excess.mass, distance), shuffle_xor(excess.slope, distance)};
}

/// The block's combination of all threads' values, in a fixed order, for every thread. All threads call.
template <int kThreads, typename Value, typename Combine>
__device__ Value reduce(Value value, Combine combine) {
  __shared__ Value s_values[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
  __syncthreads();  // the values of an earlier call have been read
  if (threadIdx.x % 32 == 0) s_values[threadIdx.x / 32] = value;
  __syncthreads();
  value = s_values[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) value = combine(value, s_values[warp]);
  return value;
}

template <int kThreads, typename Value>
__device__ Value sum(Value value) {
  return reduce<kThreads>(value, [](Value a, Value b) { return a + b; });
}

/// The larger of two values, NaN if either is.
__device__ inline float larger(float a, float b) { return a != a || a > b ? a : b; }

/// The largest of all threads' values, NaN if any is.
template <int kThreads>
__device__ float largest(float value) {
  return reduce<kThreads>(value, [](float a, float b) { return larger(a, b); });
}

/// The sum over all threads before this one, and in `total` over all. All threads call.
template <int kThreads>
__device__ int exclusive_scan(int value, int& total) {
  __shared__ int s_sums[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int upto = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, upto, distance);
    if (lane >= distance) upto += other;
  }
  __syncthreads();  // the sums of an earlier call have been read
  if (lane == 31) s_sums[warp] = upto;
  __syncthreads();
  int before = upto - value;
  total = 0;
  for (int other = 0; other < kThreads / 32; ++other) {
    if (other < warp) before += s_sums[other];
    total += s_sums[other];
  }
  return before;
}

}  // namespace entmaxkv::cuda
