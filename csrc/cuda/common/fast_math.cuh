// Approximate functions that compile to single instructions, without branches.
#pragma once

#include <cuda_runtime_api.h>

#include "../../fast_math.h"

namespace entmaxkv::cuda {

/// 1 / x to within 2^-22, for normal numbers.
__device__ inline float reciprocal(float x) {
#ifdef EMULATE_CUDA
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

/// The square root of x to within 2^-23.
__device__ inline float square_root(float x) {
#ifdef EMULATE_CUDA
  return std::sqrt(x);
#else
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#endif
}

}  // namespace entmaxkv::cuda
