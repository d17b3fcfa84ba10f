// What pages are ranked by: a page's share in the softmax of a head's page scores, as a logarithm. A head whose scores
// are all alike then asks for its pages less than one that knows which it wants.
//
// exp and log are linear between powers of two here, up to 6 % too large and 0.06 too small: what is added up are whole
// numbers, which have the same sum in any order and on any device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "entmax.h"

namespace entmaxkv::page_softmax {

/// How far a score is below the best of its head; NaN of NaN.
ENTMAXKV_HOST_DEVICE inline float distance(float score, float best) { return score == best ? 0 : score - best; }

/// exp(distance) in units of 2^-31; of NaN 0.
ENTMAXKV_HOST_DEVICE inline uint32_t weight(float distance) {
  constexpr float kPerUnit = -94548.46f;  // -2^16 / ln 2
  constexpr float kMost = 32 * 65536 - 1;
  const auto halvings = static_cast<uint32_t>(std::fmin(distance * kPerUnit, kMost));  // in units of 2^-16
  return (131072 - (halvings & 65535)) << 14 >> (halvings >> 16);
}

/// The logarithm of a sum of weights but for a constant, in units of ln 2 / 2^23; a head without any has the largest.
ENTMAXKV_HOST_DEVICE inline int32_t logarithm(uint64_t sum) {
  const float value = sum > 0 ? static_cast<float>(sum) : std::numeric_limits<float>::infinity();
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

/// By how much a logarithm is larger than the least one of the group.
ENTMAXKV_HOST_DEVICE inline float excess(int32_t logarithm, int32_t least) {
  return static_cast<float>((logarithm - least) * (0.6931471805599453 / (1 << 23)));
}

}  // namespace entmaxkv::page_softmax
