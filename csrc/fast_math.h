// Functions of sketches and page scores that a GPU may approximate.
#pragma once

#include <cmath>

#include "entmax.h"

namespace entmaxkv {

/// 2^x; on a GPU to 22 bits, and 0 where the result would be subnormal.
ENTMAXKV_HOST_DEVICE inline float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

/// log x; on a GPU its absolute error is up to 2^-21 near x = 1.
ENTMAXKV_HOST_DEVICE inline float logarithm(float x) {
#if defined(__CUDA_ARCH__)
  return __logf(x);
#else
  return std::log(x);
#endif
}

}  // namespace entmaxkv
