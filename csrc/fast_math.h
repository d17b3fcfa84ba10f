// exp2 and log for sketches and page scores, which a GPU may approximate.
#pragma once

#include <cmath>

#include "entmax.h"

namespace entmaxkv {

/// 2^x. On a GPU the result has 22 correct bits, and is 0 where it would be subnormal.
ENTMAXKV_HOST_DEVICE inline float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

/// log x to base e. On a GPU the absolute error is up to 2^-21 near x = 1.
ENTMAXKV_HOST_DEVICE inline float logarithm(float x) {
#if defined(__CUDA_ARCH__)
  return __logf(x);
#else
  return std::log(x);
#endif
}

}  // namespace entmaxkv
