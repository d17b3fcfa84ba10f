// The mathematics of alpha-entmax that both backends share.
//
// With s the scores of a row, best = max s and x_i = (alpha-1)(s_i - best) <= 0, the weights are
//     p_i = [x_i - t]_+^beta,   beta = 1/(alpha-1),   -1 <= t <= -n^(1-alpha)   such that sum_i p_i = 1
// and tau = t + (alpha-1) best. A token with s_i <= best - beta has no weight, whatever the others are.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define ENTMAXKV_HOST_DEVICE __host__ __device__
#define ENTMAXKV_NOINLINE __noinline__  // unrolled loops would fill the instruction cache with it
#else
#define ENTMAXKV_HOST_DEVICE
#define ENTMAXKV_NOINLINE
#endif

namespace entmaxkv {

/// x^exponent for x > 0; products where the exponent is a small whole number.
template <typename Real>
ENTMAXKV_HOST_DEVICE ENTMAXKV_NOINLINE inline Real any_power(Real x, Real exponent) {
  if (exponent == std::floor(exponent) && exponent <= Real(15)) {
    Real result = 1;
    for (int bits = static_cast<int>(exponent); bits; bits >>= 1, x *= x) {
      if (bits & 1) result *= x;
    }
    return result;
  }
  return std::pow(x, exponent);
}

template <typename Real>
ENTMAXKV_HOST_DEVICE inline Real power(Real x, Real exponent) {
  if (exponent == 1) return x;  // these two are those of alpha = 1.5
  if (exponent == 2) return x * x;
  return any_power(x, exponent);
}

/// sum y^beta and sum y^(beta-1) over the excesses y = x - t of the tokens above a trial threshold t.
template <typename Real>
struct Excess {
  Real mass = 0;
  Real slope = 0;

  ENTMAXKV_HOST_DEVICE void add(Real y, Real beta, Real count = 1) {
    const Real derivative = count * power(y, beta - 1);
    slope += derivative;
    mass += derivative * y;
  }

  ENTMAXKV_HOST_DEVICE friend Excess operator+(const Excess& a, const Excess& b) {
    return {a.mass + b.mass, a.slope + b.slope};
  }
};

/// alpha - 1 up to which alpha is taken for 1: the difference to softmax is below rounding.
constexpr double kSoftmaxGap = 1e-9;

template <typename Real>
struct Entmax {
  Real gap;   // alpha - 1
  Real beta;  // 1 / gap: also how far below the best score, in s, a token can still have weight

  ENTMAXKV_HOST_DEVICE explicit Entmax(Real alpha)
      : gap(alpha - 1 > Real(kSoftmaxGap) ? alpha - 1 : 0),
        beta(gap > 0 ? snapped(1 / gap) : std::numeric_limits<Real>::infinity()) {}

  /// The same alpha in another precision.
  template <typename Other>
  ENTMAXKV_HOST_DEVICE explicit Entmax(const Entmax<Other>& other)
      : gap(static_cast<Real>(other.gap)), beta(static_cast<Real>(other.beta)) {}

  ENTMAXKV_HOST_DEVICE bool is_softmax() const { return gap == 0; }

  /// How far to move t up from a trial value at or below the solution. Newton's step on
  /// (sum [x-t]_+^beta)^(1/beta) = 1: a norm of excesses that are linear in t, hence convex in t, so that no
  /// step passes the solution; and nearly linear, so that few steps are needed (one, if all x are equal).
  ENTMAXKV_HOST_DEVICE Real step(const Excess<Real>& excess) const {
    if (gap == Real(0.5)) {  // the same, as mass - 1 = (root + 1) (root - 1)
      const Real root = std::sqrt(excess.mass);
      return root * (excess.mass - 1) / ((root + 1) * excess.slope);
    }
    return -excess.mass * std::expm1(-gap * std::log(excess.mass)) / excess.slope;
  }

 private:
  /// alpha = 4/3 and its like have a whole beta that rounding has moved; power() is much faster there.
  ENTMAXKV_HOST_DEVICE static Real snapped(Real beta) {
    const Real whole = std::floor(beta + Real(0.5));
    return std::fabs(beta - whole) <= 4 * std::numeric_limits<float>::epsilon() * beta ? whole : beta;
  }
};

}  // namespace entmaxkv
