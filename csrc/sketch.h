// The key sketch: what both backends share of its layout and arithmetic.
//
// A key is rotated, r = H S k: S turns signs, fixed and random-like; H is an orthonormal Hadamard matrix of the blocks
// of kBlock dimensions (one matrix over all where their number is a power of two), zeros filling up the last one. Per
// token one step s, and of each coordinate x of r a code of 4 bits, c in 0 ... 15, the nearest to 4 x / s + 7.5:
//     fine value    (c - 7.5) s / 4                 from both planes, the high and the low 2 bits
//     coarse value  (floor(c / 4) - 1.5) kShrink s  from plane 0 alone
// and of each value's distance from r the norm, rounded up. As rotations keep products,
//     |q.k - q.value| <= ||q|| (norm of the distance)
// where arithmetic on either side is paid for too: kSlack in the norms, the query's own rounding in QueryCode.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "entmax.h"
#include "fast_math.h"
#include "ops.h"

namespace entmaxkv::sketch {

constexpr int kBlock = 64;
constexpr int kMaxDims = kMaxHeadDim;
constexpr int kUnknown = 255;      // the scale of a key that has no sketch: it may have any score
constexpr float kNormUnit = 256;   // a norm of the coarse distance, in units of s sqrt(dims) / kNormUnit
constexpr float kFineUnit = 1024;  // of the fine distance
constexpr float kSpread = 1.13f;   // s over the root mean square of r: balances both distances for normal r
constexpr float kShrink =
    0.9375f;  // normal r is nearer to 0 than the middle of its cell; this value also suits kMiddle
constexpr float kSlack = 0x1p-15f;      // times ||k||: more than rotations and products of 256 terms round or truncate
constexpr float kMostQuery = 0x1p100f;  // of a coordinate of q or scale q: larger ones could overflow in bounds

ENTMAXKV_HOST_DEVICE constexpr int dims_of(int head_dim) { return (head_dim + kBlock - 1) / kBlock * kBlock; }

/// The size of the Hadamard matrices.
ENTMAXKV_HOST_DEVICE constexpr int rotation_of(int dims) { return dims == 192 ? 64 : dims; }

/// Calls body with the number of blocks, as a type.
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

/// Bytes of a token in one plane.
ENTMAXKV_HOST_DEVICE constexpr int row_bytes(int head_dim) { return dims_of(head_dim) / 4; }

/// Bits 2 nth and 2 nth + 1 of a byte are the code of that coordinate.
ENTMAXKV_HOST_DEVICE constexpr int coordinate(int byte, int nth) { return byte / 16 * kBlock + 16 * nth + byte % 16; }

// A head's floor is the threshold on the exact scores of so many tokens of high bounds: with more of them, their keys
// cost more bytes than a higher floor saves.
constexpr int kExact = 64;

/// The sign of S for a dimension.
ENTMAXKV_HOST_DEVICE constexpr float sign_of(int d) {
  uint32_t x = (static_cast<uint32_t>(d) + 1) * 0x9e3779b9u;
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x >> 31 ? -1.0f : 1.0f;
}

/// s of a scale: 8 steps to every power of two.
ENTMAXKV_HOST_DEVICE inline float step_of(float scale) { return power_of_two(0.125f * scale - 14); }

/// 1 / s.
ENTMAXKV_HOST_DEVICE inline float steps_of(float scale) { return power_of_two(14 - 0.125f * scale); }

/// The scale whose s is nearest to the one that is wanted, or at least that; kUnknown if it is too large.
ENTMAXKV_HOST_DEVICE inline int scale_of(float wanted, bool at_least) {
  const float place = 8 * std::log2(wanted) + 112;
  if (!(place < 254)) return kUnknown;  // NaN too
  return static_cast<int>(std::fmax(at_least ? std::ceil(place + 1e-3f) : std::rint(place), 0.0f));
}

// Where a coordinate x lies among its codes is 4 x / s + 7.5: code c stands for place c, plane 0 of it for
// kShrink (4 (c >> 2) + 2).
constexpr float kMiddle = 7.5f;
static_assert(8 * kShrink == kMiddle);

/// The nearest code, in the last bits of a float. Conversions are slow on a GPU; adding kWhole rounds.
constexpr float kWhole = 0x1.8p23f;
ENTMAXKV_HOST_DEVICE inline float rounded(float place) { return std::fmin(std::fmax(place, 0.0f), 15.0f) + kWhole; }
ENTMAXKV_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

/// Squared distances of places from what their codes stand for.
struct Distances {
  float coarse = 0, fine = 0;

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

/// What is kept of a token beside its codes. Of a scale that does not fit, !fits().
struct Norms {
  int scale, coarse, fine;

  Norms() = default;

  /// From the norm of r, the sums over its coordinates, and the number of these.
  ENTMAXKV_HOST_DEVICE Norms(int scale, float norm, const Distances& squares, int dims)
      : scale(scale),
        coarse(units(norm, squares.coarse, dims, kNormUnit)),
        fine(units(norm, squares.fine, dims, kFineUnit)) {}

  ENTMAXKV_HOST_DEVICE bool fits() const { return scale != kUnknown && coarse <= 255 && fine <= 255; }

 private:
  ENTMAXKV_HOST_DEVICE int units(float norm, float square, int dims, float unit) const {
    const float distance = 0.25f * std::sqrt(square) * (1 + kSlack) + norm * steps_of(scale) * kSlack;
    return static_cast<int>(std::fmin(std::ceil(distance * unit / std::sqrt(static_cast<float>(dims))), 256.0f));
  }
};

/// A norm of a distance as bounds take it: of a key without sketch it has no end.
ENTMAXKV_HOST_DEVICE inline float distance_of(float scale, float norm) {
  return scale == kUnknown ? std::numeric_limits<float>::infinity() : norm;
}

/// What the products of a scaled and rotated query, as whole numbers of 15 bits, with codes say of scores.
struct QueryCode {
  static constexpr int kMost = 127 * 128;

  float unit;                                     // of the numbers
  float error;                                    // of a score over s, for each unit of the coarse norm; never 0
  float coarse_start, fine_start, refined_start;  // of a bound over s: for the middle of the codes, and for rounding

  QueryCode() = default;

  /// numbers_i = rint(q_i / unit) in -kMost ... kMost, sum of these; norm = ||q||, distance = ||q - unit numbers||;
  /// certain: 1, or the share of the proved error that counts.
  ENTMAXKV_HOST_DEVICE QueryCode(float unit, int sum, float norm, float distance, int dims, float certain)
      : unit(unit) {
    const float root = std::sqrt(static_cast<float>(dims));
    const float all = unit * static_cast<float>(sum);
    const float slack = 3 * root * (distance + norm * kSlack) * (1 + kSlack);
    error = norm * root * (certain / kNormUnit) * (1 + kSlack) + std::numeric_limits<float>::min();
    coarse_start = slack - 1.5f * kShrink * all;
    fine_start = slack - 0.25f * kMiddle * all;
    refined_start = -0.375f * all - (kGrow - 1) * slack;
  }

  /// Upper bounds of scale q.k: from sum_i numbers_i (c_i >> 2), and from sum_i numbers_i c_i; norms by distance_of.
  ENTMAXKV_HOST_DEVICE float coarse_bound(int product, float step, float norm) const {
    return step * (kShrink * unit * static_cast<float>(product) + (error * norm + coarse_start));
  }
  ENTMAXKV_HOST_DEVICE float fine_bound(int product, float step, float norm) const {
    return step * (0.25f * unit * static_cast<float>(product) + (0.25f * error * norm + fine_start));
  }

  /// The latter from the former, however that was rounded up, and from sum_i numbers_i (c_i & 3); of bounds with an
  /// ALiBi term if that is told.
  ENTMAXKV_HOST_DEVICE float refined(float coarse_bound, int product, float step, float coarse, float fine,
                                     float bias) const {
    const float nearer = 0.25f * fine - kGrow * coarse;
    const float moved = 0.25f * unit * static_cast<float>(product) + (error * nearer + refined_start);
    return kGrow * coarse_bound + (step * moved - (kGrow - 1) * bias);
  }

 private:
  static constexpr float kGrow = 1 / kShrink;
};

/// The unit of a query's numbers: with it the largest coordinate is kMost.
ENTMAXKV_HOST_DEVICE inline float unit_of(float largest) { return largest / QueryCode::kMost; }

// Where alpha = 1, every token has weight and there is no floor, unless a row has more tokens than may be read: then a
// floor is kBelow under the logsumexp of some tokens' scores, which is at most that of all.
constexpr float kBelow = 24;

/// What a token is worth to a head: the logarithm of the weight that its bound leaves it, the same measure for every
/// alpha, in kMerits steps: kFew to a unit from -kLowest on, kMany from -kSmall on. Bounds beyond weight 1, where they
/// are loose, count logarithmically, too.
constexpr int kMerits = 255;
constexpr float kLowest = 80, kSmall = 8, kFew = 0.5f, kMany = 12;
constexpr float kFine = kFew * (kLowest - kSmall);    // the first step of which there are many
static_assert(kMerits - 1 > kFine + kMany * kSmall);  // the last step, which has no end, is of weight 1

struct Worth {
  float gap, power;  // alpha - 1 and beta; 1 and 0 where alpha = 1

  Worth() = default;
  ENTMAXKV_HOST_DEVICE explicit Worth(const Entmax<double>& entmax)
      : gap(entmax.is_softmax() ? 1 : static_cast<float>(entmax.gap)),
        power(entmax.is_softmax() ? 0 : static_cast<float>(entmax.beta)) {}

  /// In steps, of a bound so far above the floor.
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

ENTMAXKV_HOST_DEVICE inline int merit_of(float worth) {
  return worth < kMerits - 1 ? static_cast<int>(std::fmax(worth, 0.0f)) : kMerits - 1;  // NaN too
}

/// The weight that a token of that merit has at most, with room for what rounding does to its worth.
ENTMAXKV_HOST_DEVICE inline double most_weight(int merit) {
  const double end = merit + 1.001;
  return std::fmin(std::exp(end < kFine ? end / kFew - kLowest : (end - kFine) / kMany - kSmall), 1.0);
}

/// The weight that a token below the floor has at most.
ENTMAXKV_HOST_DEVICE inline double most_below(const Entmax<double>& entmax) {
  return entmax.is_softmax() ? std::exp(-double{kBelow}) : 0;
}

/// A sum of such weights as a bound of what they are together: 0 only if it is.
ENTMAXKV_HOST_DEVICE inline float rounded_up(double weight) {
  return weight > 0 ? static_cast<float>(std::fmin(weight * (1 + 0x1p-20) + 1e-37, 1.0)) : 0;
}

/// A slope that rounds ALiBi terms up, of distances of 0 and below.
ENTMAXKV_HOST_DEVICE inline float upward(float slope) { return slope - std::fabs(slope) * 0x1p-20f; }

}  // namespace entmaxkv::sketch
