// The key sketch: how both backends store it, and how they bound scores with it.
//
// Rotation. A key k of head_dim coordinates becomes r = H S k of `dims` coordinates: head_dim rounded up to whole
// blocks of kBlock, the new ones 0. S flips the signs of fixed, random-like coordinates. H is an orthonormal Hadamard
// matrix: one matrix over all dims where the number of blocks is a power of two, otherwise one in each block. A
// rotation keeps products and norms, so (H S q).r = q.k. It spreads outliers over all coordinates, so that one step
// suits them all.
//
// Codes. A token has a step s. Each coordinate x of its r has a code c of 4 bits, the whole number in 0 ... 15 that is
// nearest to its place 4 x / s + 7.5. Plane 0 stores the high 2 bits of every code, floor(c / 4), and plane 1 the low
// 2 bits. Two values approximate x:
//     coarse value = (floor(c / 4) - 1.5) kShrink s    needs plane 0 only
//     fine value   = (c - 7.5) s / 4                   needs both planes
//
// Norms. A token has three bytes. `scale` encodes s (step_of). The coarse norm and the fine norm encode the lengths of
// the vectors r - coarse values and r - fine values, its coarse and its fine distance, rounded up.
//
// Bounds. By the Cauchy-Schwarz inequality, for either kind of values,
//     |q.k - (H S q).values| <= ||q|| ||r - values||
// Floating-point arithmetic adds errors. kSlack in the norms covers those of the key, QueryCode those of the query.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "entmax.h"
#include "fast_math.h"
#include "ops.h"

namespace entmaxkv::sketch {

constexpr int kBlock = 64;  // coordinates
constexpr int kMaxDims = kMaxHeadDim;
constexpr int kUnknown = 255;      // the scale of a token without a sketch: its score may be anything
constexpr float kNormUnit = 256;   // a coarse norm of n stands for a distance of n s sqrt(dims) / kNormUnit
constexpr float kFineUnit = 1024;  // a fine norm of n stands for a distance of n s sqrt(dims) / kFineUnit
constexpr float kSpread = 1.13f;   // s = kSpread times the root mean square of r balances both distances for normal r
/// Plane 0 tells a cell of width s in which x lies. The x of a normal r are on average nearer to 0 than the middle of
/// their cell, by about this factor. Exactly 15/16 also makes the places of coarse values multiples of kShrink.
constexpr float kShrink = 0.9375f;
constexpr float kSlack = 0x1p-15f;      // times ||k||: more than the rounding of rotations and products of 256 terms
constexpr float kMostQuery = 0x1p100f;  // the largest coordinate of q or scale q: with larger ones, bounds may overflow

/// The coordinates of a rotated key or query.
ENTMAXKV_HOST_DEVICE constexpr int dims_of(int head_dim) { return (head_dim + kBlock - 1) / kBlock * kBlock; }

/// The size of each Hadamard matrix.
ENTMAXKV_HOST_DEVICE constexpr int rotation_of(int dims) { return dims == 192 ? 64 : dims; }

/// Calls body with the number of blocks as a compile-time constant.
template <typename Body>
void dispatch_blocks(int head_dim, Body body) {
  switch (dims_of(head_dim) / kBlock) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, 4>{});
  }
}

/// Bytes of one token in one plane: 2 bits for each coordinate.
ENTMAXKV_HOST_DEVICE constexpr int row_bytes(int head_dim) { return dims_of(head_dim) / 4; }

/// Returns which coordinate the bits 2 nth and 2 nth + 1 of a byte of a plane belong to, nth = 0 ... 3. A block of 64
/// coordinates takes 16 bytes: byte b of them holds the coordinates b, 16 + b, 32 + b and 48 + b of the block.
ENTMAXKV_HOST_DEVICE constexpr int coordinate(int byte, int nth) { return byte / 16 * kBlock + 16 * nth + byte % 16; }

/// A head's floor is the threshold of the exact scores of this many tokens, those with the highest bounds. More tokens
/// would raise the floor, but reading their keys would cost more bytes than the higher floor saves.
constexpr int kExact = 64;

/// The sign by which S multiplies coordinate d.
ENTMAXKV_HOST_DEVICE constexpr float sign_of(int d) {
  uint32_t x = (static_cast<uint32_t>(d) + 1) * 0x9e3779b9u;
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x >> 31 ? -1.0f : 1.0f;
}

/// The step s of a scale, 2^(scale/8 - 14). Eight scales double it.
ENTMAXKV_HOST_DEVICE inline float step_of(float scale) { return power_of_two(0.125f * scale - 14); }

/// 1 / s: how many steps fit into 1.
ENTMAXKV_HOST_DEVICE inline float steps_of(float scale) { return power_of_two(14 - 0.125f * scale); }

/// The scale whose s is nearest to `step` or, if at_least, the smallest scale whose s is at least `step`. kUnknown if
/// no scale is large enough.
ENTMAXKV_HOST_DEVICE inline int scale_of(float step, bool at_least) {
  const float place = 8 * std::log2(step) + 112;
  if (!(place < 254)) return kUnknown;  // NaN too
  return static_cast<int>(std::fmax(at_least ? std::ceil(place + 1e-3f) : std::rint(place), 0.0f));
}

/// The place of a coordinate x is 4 x / s + kMiddle. The fine value of code c has the place c, its coarse value the
/// place kShrink (4 (c >> 2) + 2).
constexpr float kMiddle = 7.5f;
static_assert(8 * kShrink == kMiddle);

/// Adding this to a small number rounds it to a whole number, which then stands in the last bits of the float. A GPU
/// does that faster than it converts a float to an integer.
constexpr float kWhole = 0x1.8p23f;

/// kWhole plus the code nearest to a place.
ENTMAXKV_HOST_DEVICE inline float rounded(float place) { return std::fmin(std::fmax(place, 0.0f), 15.0f) + kWhole; }

/// The bits of a float. The last 4 bits of bits_of(rounded(place)) are the code.
ENTMAXKV_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

/// Sums over the coordinates of a key: the squared distances of their places from the places of their coarse and fine
/// values. A distance of 1 between places is one of s / 4 between coordinates.
struct Distances {
  float coarse = 0, fine = 0;

  /// Adds a coordinate. rounded = sketch::rounded(place).
  ENTMAXKV_HOST_DEVICE void add(float place, float rounded) {
    const uint32_t high_bits = bits_of(rounded) & ~3u;
    float high;
    memcpy(&high, &high_bits, sizeof(high));
    const float c = place - kShrink * (high - (kWhole - 2)), f = place - (rounded - kWhole);
    coarse += c * c;
    fine += f * f;
  }

  ENTMAXKV_HOST_DEVICE friend Distances operator+(const Distances& a, const Distances& b) {
    return {a.coarse + b.coarse, a.fine + b.fine};
  }
};

/// The three bytes of a token. While a scale is being chosen they may be too large for bytes: then fits() is false.
struct Norms {
  int scale, coarse, fine;

  Norms() = default;

  /// norm = ||r||; squares are the sums over the dims coordinates of r, with the step of `scale`.
  ENTMAXKV_HOST_DEVICE Norms(int scale, float norm, const Distances& squares, int dims)
      : scale(scale),
        coarse(units(norm, squares.coarse, dims, kNormUnit)),
        fine(units(norm, squares.fine, dims, kFineUnit)) {}

  ENTMAXKV_HOST_DEVICE bool fits() const { return scale != kUnknown && coarse <= 255 && fine <= 255; }

 private:
  /// A distance in units of s sqrt(dims) / unit, rounded up; at most 256, which does not fit a byte.
  ENTMAXKV_HOST_DEVICE int units(float norm, float square, int dims, float unit) const {
    const float distance = 0.25f * std::sqrt(square) * (1 + kSlack) + norm * steps_of(scale) * kSlack;
    return static_cast<int>(std::fmin(std::ceil(distance * unit / std::sqrt(static_cast<float>(dims))), 256.0f));
  }
};

/// A coarse or fine norm as the bounds below take it: infinite for a token without a sketch.
ENTMAXKV_HOST_DEVICE inline float distance_of(float scale, float norm) {
  return scale == kUnknown ? std::numeric_limits<float>::infinity() : norm;
}

/// A query in whole numbers, and the upper bounds of scale q.k that follow from its products with the codes of a key.
/// The scaled and rotated query, scale H S q, is rounded to multiples of `unit`:
///     numbers_i = rint((scale H S q)_i / unit)   in -kMost ... kMost
/// A `product` is the sum over i of numbers_i times floor(c_i / 4), c_i or c_i & 3. A bound adds up, in units of s,
///     the product of the rounded query with the key's coarse or fine values,
///     the key's coarse or fine norm times `error` (the Cauchy-Schwarz inequality above),
///     a slack for rounding the query to numbers, and for the rounding errors of all arithmetic.
/// What is the same for every key is in the `_start` members: the slack, and the 1.5 or 7.5 that a value subtracts from
/// its code.
struct QueryCode {
  static constexpr int kMost = 127 * 128;

  float unit;   // what 1 in the numbers stands for
  float error;  // what each unit of a coarse norm adds to a bound. Never 0, as 0 times an infinite norm would be NaN.
  float coarse_start, fine_start, refined_start;

  QueryCode() = default;

  /// sum = sum_i numbers_i, norm = ||scale q||, distance = ||scale H S q - unit numbers||. error_factor multiplies the
  /// keys' norms: 1 for bounds that are certain, less for bounds that hold with some probability.
  ENTMAXKV_HOST_DEVICE QueryCode(float unit, int sum, float norm, float distance, int dims, float error_factor)
      : unit(unit) {
    const float root = std::sqrt(static_cast<float>(dims));
    const float all = unit * static_cast<float>(sum);
    // The norm of a key's values is less than 3 s root.
    const float slack = 3 * root * (distance + norm * kSlack) * (1 + kSlack);
    error = norm * root * (error_factor / kNormUnit) * (1 + kSlack) + std::numeric_limits<float>::min();
    coarse_start = slack - 1.5f * kShrink * all;
    fine_start = slack - 0.25f * kMiddle * all;
    refined_start = -0.375f * all - (kGrow - 1) * slack;
  }

  /// An upper bound of scale q.k from plane 0: product = sum_i numbers_i floor(c_i / 4), step = s, and norm is
  /// distance_of the coarse norm.
  ENTMAXKV_HOST_DEVICE float coarse_bound(int product, float step, float norm) const {
    return step * (kShrink * unit * static_cast<float>(product) + (error * norm + coarse_start));
  }
  /// An upper bound of scale q.k from both planes: product = sum_i numbers_i c_i, and norm is distance_of the fine
  /// norm.
  ENTMAXKV_HOST_DEVICE float fine_bound(int product, float step, float norm) const {
    return step * (0.25f * unit * static_cast<float>(product) + (0.25f * error * norm + fine_start));
  }

  /// Tightens a coarse bound with plane 1's product, sum_i numbers_i (c_i & 3). `coarse_bound` may have been rounded
  /// up. If it includes an ALiBi term, pass that term as `bias`. `coarse` and `fine` are distance_of the two norms.
  ENTMAXKV_HOST_DEVICE float refined(float coarse_bound, int product, float step, float coarse, float fine,
                                     float bias) const {
    const float nearer = 0.25f * fine - kGrow * coarse;
    const float moved = 0.25f * unit * static_cast<float>(product) + (error * nearer + refined_start);
    return kGrow * coarse_bound + (step * moved - (kGrow - 1) * bias);
  }

 private:
  static constexpr float kGrow = 1 / kShrink;
};

/// The unit for a query whose largest coordinate is `largest`: that coordinate's number is kMost.
ENTMAXKV_HOST_DEVICE inline float unit_of(float largest) { return largest / QueryCode::kMost; }

/// Where alpha = 1, every token has weight, and no floor can rule one out. Only if a row has more tokens than may be
/// read, a head's floor is this much below the logsumexp of some tokens' scores, which is at most that of all tokens:
/// a token below the floor has at most exp(-kBelow) of the weight.
constexpr float kBelow = 24;

/// The worth of a token to a head is the logarithm of the largest weight that the token's bound permits. That weight is
///     above^beta, where above = (alpha-1) (bound - floor), or exp(bound - floor - kBelow) where alpha = 1.
/// Logarithms compare tokens of heads with different alphas. Worth counts them in steps, kMerits in all: kFew steps to
/// a unit from -kLowest on, and kMany steps to a unit from -kSmall on. Loose bounds permit weights above 1, logarithms
/// above 0. Worth takes these as 2 log(above), and where alpha = 1 as 2 log(1 + logarithm).
constexpr int kMerits = 255;
constexpr float kLowest = 80, kSmall = 8, kFew = 0.5f, kMany = 12;
constexpr float kFine = kFew * (kLowest - kSmall);    // the steps below -kSmall
static_assert(kMerits - 1 > kFine + kMany * kSmall);  // the last merit begins above weight 1, and has no upper end

struct Worth {
  float gap, power;  // alpha - 1 and beta; where alpha = 1: 1 and 0

  Worth() = default;
  ENTMAXKV_HOST_DEVICE explicit Worth(const Entmax<double>& entmax)
      : gap(entmax.is_softmax() ? 1 : static_cast<float>(entmax.gap)),
        power(entmax.is_softmax() ? 0 : static_cast<float>(entmax.beta)) {}

  /// The worth, in steps, of a token whose bound is `distance` above the head's floor.
  ENTMAXKV_HOST_DEVICE float of(float distance) const {
    float exponent;
    if (power == 0) {
      exponent = distance - kBelow;
      if (exponent > 0) exponent = kBeyond * logarithm(1 + exponent);
    } else {
      const float above = gap * distance;
      exponent = logarithm(above < kLeast ? kLeast : above);
      exponent *= exponent < 0 ? power : kBeyond;
    }
    return exponent < -kSmall ? kFew * (exponent + kLowest) : kFine + kMany * (exponent + kSmall);
  }

 private:
  static constexpr float kLeast = 1e-30f, kBeyond = 2;
};

/// The merit of a token: its worth to the head that values it most, rounded down, in 0 ... kMerits - 1.
ENTMAXKV_HOST_DEVICE inline int merit_of(float worth) {
  return worth < kMerits - 1 ? static_cast<int>(std::fmax(worth, 0.0f)) : kMerits - 1;  // NaN too
}

/// An upper bound of the weight of a token with this merit. 0.001 steps of it allow for rounding in the worth.
ENTMAXKV_HOST_DEVICE inline double most_weight(int merit) {
  const double end = merit + 1.001;
  return std::fmin(std::exp(end < kFine ? end / kFew - kLowest : (end - kFine) / kMany - kSmall), 1.0);
}

/// An upper bound of the weight of a token below the floor.
ENTMAXKV_HOST_DEVICE inline double most_below(const Entmax<double>& entmax) {
  return entmax.is_softmax() ? std::exp(-double{kBelow}) : 0;
}

/// Rounds a sum of such bounds up, to a bound of the tokens' weight together. A sum of 0 is exact and stays 0.
ENTMAXKV_HOST_DEVICE inline float rounded_up(double weight) {
  return weight > 0 ? static_cast<float>(std::fmin(weight * (1 + 0x1p-20) + 1e-37, 1.0)) : 0;
}

/// A slope with which ALiBi terms, slope times a distance of 0 or below, are rounded up.
ENTMAXKV_HOST_DEVICE inline float upward(float slope) { return slope - std::fabs(slope) * 0x1p-20f; }

}  // namespace entmaxkv::sketch
