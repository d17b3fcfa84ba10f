// Row kernels for AVX2. The headers must come before the pragma: rows_avx512.cpp says why.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <utility>

#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define ENTMAXKV_ISA avx2

namespace entmaxkv::cpu::avx2 {
constexpr int kLanes = 8;
typedef float Vector __attribute__((vector_size(4 * kLanes)));

inline Vector load(const Float16* from) {
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
}  // namespace entmaxkv::cpu::avx2

#include "rows.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
