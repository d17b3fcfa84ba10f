// What the ops on scores share.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../dtype.h"

namespace entmaxkv::cpu {

constexpr float kNothing = -std::numeric_limits<float>::infinity();    // the score of no token
constexpr float kUndefined = std::numeric_limits<float>::quiet_NaN();  // the result where there is no right one

/// The search for a threshold ends where it moves less than this (find_threshold). x lies in -1 ... 0.
constexpr double kLeastMove = 1e-12;

/// The larger number, or NaN if either is NaN.
inline float larger(float a, float b) { return a != a || a > b ? a : b; }

/// The queries of a KV head's group in fp32: [group, head_dim].
template <typename T, typename Op>
std::vector<float> queries_of(const Op& op, int64_t row, int kv_head) {
  std::vector<float> queries(int64_t{op.group} * op.head_dim);
  for (int h = 0; h < op.group; ++h) {
    const T* from = op.q.template at<T>(row, kv_head * op.group + h);
    for (int d = 0; d < op.head_dim; ++d) queries[h * op.head_dim + d] = to_float(from[d]);
  }
  return queries;
}

}  // namespace entmaxkv::cpu
