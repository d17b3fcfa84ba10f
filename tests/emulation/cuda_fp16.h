#pragma once

#include <cuda_runtime_api.h>

#include "../../csrc/dtype.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return entmaxkv::to_float(entmaxkv::Float16{x.bits}); }
inline __half __float2half_rn(float x) { return {entmaxkv::from_float<entmaxkv::Float16>(x).bits}; }

inline __half __float2half_ru(float x) {
  const __half nearest = __float2half_rn(x);
  const float rounded = __half2float(nearest);
  if (!(rounded < x)) return nearest;
  return {static_cast<uint16_t>(rounded > 0 || nearest.bits == 0 ? nearest.bits + 1
                                : nearest.bits == 0x8000         ? 1
                                                                 : nearest.bits - 1)};
}

/// emulation::multiply_fragments calls this overload by argument type.
inline float emulated_value(__half x) { return __half2float(x); }
