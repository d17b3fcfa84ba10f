#pragma once

#include <cuda_runtime_api.h>

#include "../../csrc/dtype.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return entmaxkv::to_float(entmaxkv::Float16{x.bits}); }
inline __half __float2half_rn(float x) { return {entmaxkv::from_float<entmaxkv::Float16>(x).bits}; }

/// What emulation::multiply_fragments finds by argument type.
inline float emulated_value(__half x) { return __half2float(x); }
