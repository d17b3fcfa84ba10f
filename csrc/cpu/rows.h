// Vectorised work on rows of keys, values or page statistics. Each function exists once per vector width; the
// width is chosen at run time, so that one binary serves every machine.
#pragma once

#include "../dtype.h"
#include "../sketch.h"

namespace entmaxkv::cpu {

/// Sums run over head_dim in fp32; q is fp32 and is never rounded. `heads` query rows lie head_dim apart.
template <typename T>
struct RowKernels {
  /// out[h * out_stride + i] = sum_d q[h][d] rows[i][d]
  void (*dot)(const T* const* rows, int count, const float* q, int heads, int head_dim, float* out, int out_stride);
  /// out[h * out_stride + i] = sum_d q[h][d] rows[i][d]^2
  void (*dot_squares)(const T* const* rows, int count, const float* q, int heads, int head_dim, float* out,
                      int out_stride);
  /// out[h][d] += sum_i weights[i][h] rows[i][d]
  void (*accumulate)(const T* const* rows, int count, const float* weights, int heads, int head_dim, float* out);
  /// Minimum, maximum, mean and population standard deviation of each dimension over count > 0 rows. NaN among them
  /// makes the first three NaN: bounds must not hide it.
  void (*summarise)(const T* const* rows, int count, int head_dim, float* min, float* max, float* mean, float* std);
  /// out[h * out_stride + i] = sum_d numbers[h][d] c_d with the codes c of count sketched keys, whose rows in a plane
  /// follow each other (sketch.h); or c >> 2 if `low` is null.
  void (*dot_codes)(const uint8_t* high, const uint8_t* low, int count, const int16_t* numbers, int heads, int dims,
                    int* out, int out_stride);
};

/// The kernels for the widest vectors of this machine, or those that ATEN_CPU_CAPABILITY names (as in torch).
template <typename T>
const RowKernels<T>& row_kernels();

}  // namespace entmaxkv::cpu
