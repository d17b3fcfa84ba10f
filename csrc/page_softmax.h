// The merit by which select_pages ranks pages: the largest log page softmax for any head of the group. A page's page
// softmax is its weight in the softmax of a head's page scores:
//     log page softmax = (score - best) - log sum_pages exp(score - best)
// A head with many similar page scores thus gives each page little merit. A head with few high ones gives them much.
//
// exp and log are replaced by functions that are linear between powers of two. This exp is up to 6 % too large, this
// log up to 0.06 too small. In return the sum is one of whole numbers, which is the same in any order and on any
// device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "entmax.h"

namespace entmaxkv::page_softmax {

/// A score less the best score of its head, at most 0. It is 0 where both are the same infinity, and NaN for NaN.
ENTMAXKV_HOST_DEVICE inline float distance(float score, float best) { return score == best ? 0 : score - best; }

/// exp(distance) in units of 2^-31, for a distance of at most 0. It is 0 for NaN.
ENTMAXKV_HOST_DEVICE inline uint32_t weight(float distance) {
  constexpr float kPerUnit = -94548.46f;  // -2^16 / ln 2
  constexpr float kMost = 32 * 65536 - 1;
  const auto halvings = static_cast<uint32_t>(std::fmin(distance * kPerUnit, kMost));  // in units of 2^-16
  return (131072 - (halvings & 65535)) << 14 >> (halvings >> 16);
}

/// The logarithm of a sum of weights plus a constant, in units of ln 2 / 2^23. A sum of 0 means that all scores of the
/// head are NaN, and has the largest logarithm.
ENTMAXKV_HOST_DEVICE inline int32_t logarithm(uint64_t sum) {
  const float value = sum > 0 ? static_cast<float>(sum) : std::numeric_limits<float>::infinity();
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

/// By how much a head's logarithm exceeds the least logarithm of the group, as a plain number to base e.
ENTMAXKV_HOST_DEVICE inline float excess(int32_t logarithm, int32_t least) {
  return static_cast<float>((logarithm - least) * (0.6931471805599453 / (1 << 23)));
}

}  // namespace entmaxkv::page_softmax
