#pragma once

#include <cuda_runtime_api.h>

#include "../../csrc/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return entmaxkv::to_float(entmaxkv::BFloat16{x.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {entmaxkv::from_float<entmaxkv::BFloat16>(x).bits}; }

/// emulation::multiply_fragments calls this overload by argument type.
inline float emulated_value(__nv_bfloat16 x) { return __bfloat162float(x); }

namespace emulation {

/// fma.rn.bf16x2. It rounds twice, so the result may differ where it is not exact.
inline uint32_t multiply_add(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t sums = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto value = [&](uint32_t pair) {
      return static_cast<double>(__bfloat162float({static_cast<uint16_t>(pair >> shift)}));
    };
    sums |= uint32_t{__float2bfloat16_rn(static_cast<float>(value(x) * value(y) + value(z))).bits} << shift;
  }
  return sums;
}

}  // namespace emulation
