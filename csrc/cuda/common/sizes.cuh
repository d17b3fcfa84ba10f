// Arithmetic on sizes, and the length of a row.
#pragma once

#include <cuda_runtime_api.h>

#include "../../ops.h"

namespace entmaxkv::cuda {

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Returns the number of tokens of a row: seq_lens[row], limited to 0 ... what the row's page table has room for.
template <typename Op>
__device__ int length_of(const Op& op, int64_t row) {
  return max(0, min(op.seq_lens[row], op.max_pages * op.page_size));
}

/// Returns the binary logarithm of a power of two.
__device__ inline int log2_of(int power) { return __ffs(power) - 1; }

}  // namespace entmaxkv::cuda
