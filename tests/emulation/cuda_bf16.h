#pragma once

#include <cuda_runtime_api.h>

#include "../../csrc/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return entmaxkv::to_float(entmaxkv::BFloat16{x.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {entmaxkv::from_float<entmaxkv::BFloat16>(x).bits}; }

/// What emulation::multiply_fragments finds by argument type.
inline float emulated_value(__nv_bfloat16 x) { return __bfloat162float(x); }
