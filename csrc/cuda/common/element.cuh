// The element types of a cache, and the float values for "no score" (kNothing) and "undefined" (kUndefined).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../ops.h"

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

}  // namespace entmaxkv::cuda
