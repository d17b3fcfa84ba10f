// Approximate functions that compile to single instructions, without branches.
#pragma once

#include <cuda_runtime_api.h>

#include "../../fast_math.h"

namespace entmaxkv::cuda {

/// Returns 1 / x with a relative error of at most 2^-22, for normal numbers.
__device__ inline float reciprocal(float x) {
#ifdef EMULATE_CUDA
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

/// Returns the square root of x with a relative error of at most 2^-23.
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
