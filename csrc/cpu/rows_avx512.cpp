// Row kernels for AVX-512.
// Every header comes before the target pragma. Otherwise an inline function of the standard library would be compiled
// for AVX-512 here, and the linker might keep that copy for the whole binary, which then fails on older machines.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <utility>

#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif

#define ENTMAXKV_ISA avx512

namespace entmaxkv::cpu::avx512 {
constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(4 * kLanes)));

inline Vector load(const Float16* from) {
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
}  // namespace entmaxkv::cpu::avx512

#include "rows.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
