// The element types of a cache on the CPU, and their conversion to and from float.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

namespace entmaxkv {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t infinity = 0x7c00u << 13;
  const float value = bit_cast<float>(magnitude) * 0x1p112f;  // corrects the exponent bias, of subnormals too
  return bit_cast<float>(sign | (magnitude >= infinity ? magnitude | 0x7f800000u : bit_cast<uint32_t>(value)));
}

/// Rounds to the nearest number, ties to even.
template <typename T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

/// Calls body with a value of the C++ type that `dtype` stands for.
template <typename Body>
auto dispatch(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat16:
      return body(Float16{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
    default:
      return body(float{});
  }
}

}  // namespace entmaxkv
