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

/// A property of the current device.
inline int device_property(cudaDeviceAttr property) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, property, device);
  return value;
}

inline int multiprocessors() { return device_property(cudaDevAttrMultiProcessorCount); }

/// From compute capability 9.0 on there are thread block clusters and dependent launches.
inline bool is_hopper_or_later() { return device_property(cudaDevAttrComputeCapabilityMajor) >= 9; }

/// The blocks of a launch.
struct Grid {
  dim3 blocks;
  int threads;
  int cluster = 1;  // blocks, along x, that share their memory: more than one from Hopper on
  int shared = 0;   // bytes of dynamic shared memory of a block
};

/// Launches a kernel that begins with take_turn(): from Hopper on, its blocks come to the multiprocessors while the
/// kernel before it still runs.
template <typename... Params>
void launch(const char* op, void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
            std::common_type_t<Params>... params) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = grid.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !is_hopper_or_later() ? 0 : grid.cluster == 1 ? 1 : 2;
  if (grid.shared > 0) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared));
  }
  check(op, cudaLaunchKernelEx(&config, kernel, params...));
}

/// First in every kernel, by every thread: waits until the kernels before this one are done, and lets the next come.
/// The other way round, blocks of ever later kernels come and wait, and steps take longer (bench/NOTES.md).
__device__ inline void take_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// The block's dynamic shared memory.
__device__ inline uint4* dynamic_shared() {
#ifdef EMULATE_CUDA
  return emulation::dynamic_shared();  // tests/emulation
#else
  extern __shared__ uint4 s_dynamic[];
  return s_dynamic;
#endif
}

/// Begins to fetch the line of that address into L2.
__device__ inline void prefetch([[maybe_unused]] const void* address) {
#ifndef EMULATE_CUDA
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

/// Begins to copy 16 bytes into shared memory; zeros, if they are not wanted. Ends with wait_for_copies.
__device__ inline void copy_async(uint4& s_to, const void* from, bool wanted) {
#ifdef EMULATE_CUDA
  s_to = wanted ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(&s_to))),
      "l"(from), "r"(wanted ? 16 : 0)
      : "memory");
#endif
}

/// The same for one number.
__device__ inline void copy_async(float& s_to, const float* from) {
#ifdef EMULATE_CUDA
  s_to = *from;
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(&s_to))),
               "l"(from)
               : "memory");
#endif
}

/// The copies begun so far by this thread, and after the last call, are one lot.
__device__ inline void commit_copies() {
#ifndef EMULATE_CUDA
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Until no more than kLots lots of this thread are under way.
template <int kLots>
__device__ void wait_for_copies() {
#ifndef EMULATE_CUDA
  asm volatile("cp.async.wait_group %0;" ::"n"(kLots) : "memory");
#endif
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Tokens of a row, whatever seq_lens says: never more than its page table has room for.
template <typename Op>
__device__ int length_of(const Op& op, int64_t row) {
  return max(0, min(op.seq_lens[row], op.max_pages * op.page_size));
}

/// Of a power of two.
__device__ inline int log2_of(int power) { return __ffs(power) - 1; }

/// The new tokens of a row: never more than k and v hold, whatever `lengths` says, or than the cache has room for.
struct Span {
  int first, end;

  __device__ Span(const AppendKv& op, int64_t row) : first(max(0, op.seq_lens[row])) {
    const int tokens = op.lengths ? max(0, min(op.lengths[row], op.tokens)) : op.tokens;
    end = min(first + tokens, op.max_pages * op.page_size);
  }
};

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

/// The combination of the values of kThreads threads, a block or a warp, in a fixed order, for each of them.
/// They all call.
template <int kThreads, typename Value, typename Combine>
__device__ Value reduce(Value value, Combine combine) {
  constexpr int kWarps = kThreads / 32;
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

template <int kThreads, typename Value>
__device__ Value sum(Value value) {
  return reduce<kThreads>(value, [](Value a, Value b) { return a + b; });
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
template <int kThreads>
__device__ float largest(float value) {
  return reduce<kThreads>(value, [](float a, float b) { return larger(a, b); });
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
template <int kThreads, typename Number>
__device__ Number exclusive_scan(Number value, Number& total) {
  constexpr int kWarps = kThreads / 32;
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

/// Where the wanted ones of a block's items go, one behind the other: item i of thread t is the (i kThreads + t)-th.
template <int kThreads, int kItems>
struct Places {
  int place[kItems];  // of those that are wanted
  int count;          // of all threads

  /// All threads call.
  __device__ explicit Places(const bool (&wanted)[kItems]) {
    constexpr int kWarps = kThreads / 32;
    static_assert(kItems * kWarps <= kThreads);
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
    const int before = exclusive_scan<kThreads>(counts ? s_before[threadIdx.x] : 0, count);
    if (counts) s_before[threadIdx.x] = before;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      place[i] = s_before[i * kWarps + warp] + __popc(masks[i] & ((1u << lane) - 1));
    }
  }
};

}  // namespace entmaxkv::cuda
