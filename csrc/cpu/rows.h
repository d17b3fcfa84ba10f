// Vectorised work on rows of keys, values or page statistics. A row is head_dim contiguous elements. Each function
// exists once per vector width, and the width is chosen at run time: one binary serves every machine.
#pragma once

#include "../dtype.h"
#include "../sketch.h"

namespace entmaxkv::cpu {

/// Sums are in fp32. q holds the queries of `heads` heads in fp32, [heads, head_dim].
template <typename T>
struct RowKernels {
  /// out[h * out_stride + i] = sum_d q[h][d] rows[i][d]
  void (*dot)(const T* const* rows, int count, const float* q, int heads, int head_dim, float* out, int out_stride);
  /// out[h * out_stride + i] = sum_d q[h][d] rows[i][d]^2
  void (*dot_squares)(const T* const* rows, int count, const float* q, int heads, int head_dim, float* out,
                      int out_stride);
  /// out[h][d] += sum_i weights[i][h] rows[i][d]
  void (*accumulate)(const T* const* rows, int count, const float* weights, int heads, int head_dim, float* out);
  /// Minimum, maximum, mean and population standard deviation of each dimension over count > 0 rows. If a value is NaN,
  /// the first three are NaN: bounds must not hide it.
  void (*summarise)(const T* const* rows, int count, int head_dim, float* min, float* max, float* mean, float* std);
  /// The products of queries with codes (sketch.h, QueryCode): out[h * out_stride + i] = sum_d numbers[h][d] c_d, with
  /// the codes c of key i. If `low` is null, c_d >> 2 takes the place of c_d. `high` and `low` point to the first of
  /// `count` successive keys in plane 0 and plane 1.
  void (*dot_codes)(const uint8_t* high, const uint8_t* low, int count, const int16_t* numbers, int heads, int dims,
                    int* out, int out_stride);
};

/// The kernels for the widest vectors that this machine has and ATEN_CPU_CAPABILITY permits (as in torch).
template <typename T>
const RowKernels<T>& row_kernels();

}  // namespace entmaxkv::cpu
