// The mathematics of alpha-entmax that both backends share.
//
// s_i are the scores of one head's n tokens, best = max s, and x_i = (alpha-1)(s_i - best) <= 0. The weights are
//     p_i = [x_i - t]_+^beta,   beta = 1/(alpha-1)
// where the threshold t is the number in -1 ... -n^(1-alpha) that makes sum_i p_i = 1. On the scale of
// z_i = (alpha-1) s_i, where p_i = [z_i - tau]_+^beta, the threshold is tau = t + (alpha-1) best.
// Since t >= -1, a token with s_i <= best - beta has no weight, whatever the other scores are.
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

/// x^exponent for x > 0. A whole exponent of at most 15 takes multiplications only.
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

/// Like any_power, with exponents 1 and 2 (alpha = 1.5) inline.
template <typename Real>
ENTMAXKV_HOST_DEVICE inline Real power(Real x, Real exponent) {
  if (exponent == 1) return x;
  if (exponent == 2) return x * x;
  return any_power(x, exponent);
}

/// What the tokens above a trial threshold t add up to. y = x - t > 0 is the excess of such a token.
template <typename Real>
struct Excess {
  Real mass = 0;   // sum y^beta; 1 at the threshold
  Real slope = 0;  // sum y^(beta-1): the derivative of mass by -t is beta times that

  /// Adds `count` tokens of excess y.
  ENTMAXKV_HOST_DEVICE void add(Real y, Real beta, Real count = 1) {
    const Real derivative = count * power(y, beta - 1);
    slope += derivative;
    mass += derivative * y;
  }

  ENTMAXKV_HOST_DEVICE friend Excess operator+(const Excess& a, const Excess& b) {
    return {a.mass + b.mass, a.slope + b.slope};
  }
};

/// An alpha that exceeds 1 by no more than this is taken for 1: there, entmax and softmax differ by less than rounding.
constexpr double kSoftmaxGap = 1e-9;

/// One head's alpha, as the formulas above use it.
template <typename Real>
struct Entmax {
  Real gap;   // alpha - 1; 0 where alpha = 1
  Real beta;  // 1 / gap, infinite where alpha = 1. Tokens with weight have scores s above best - beta.

  ENTMAXKV_HOST_DEVICE explicit Entmax(Real alpha)
      : gap(alpha - 1 > Real(kSoftmaxGap) ? alpha - 1 : 0),
        beta(gap > 0 ? snapped(1 / gap) : std::numeric_limits<Real>::infinity()) {}

  /// The same alpha in another precision.
  template <typename Other>
  ENTMAXKV_HOST_DEVICE explicit Entmax(const Entmax<Other>& other)
      : gap(static_cast<Real>(other.gap)), beta(static_cast<Real>(other.beta)) {}

  ENTMAXKV_HOST_DEVICE bool is_softmax() const { return gap == 0; }

  /// How far to move t up from a trial value at or below the threshold, given what lies above that trial value.
  /// It is Newton's step on the equation (sum [x-t]_+^beta)^(1/beta) = 1. The left side is a norm of excesses that are
  /// linear in t, so it is convex in t, and no step passes the solution. It is also nearly linear in t, so few steps
  /// are needed: one, if all x are equal.
  ENTMAXKV_HOST_DEVICE Real step(const Excess<Real>& excess) const {
    if (gap == Real(0.5)) {  // the formula below, rewritten with mass - 1 = (root + 1) (root - 1)
      const Real root = std::sqrt(excess.mass);
      return root * (excess.mass - 1) / ((root + 1) * excess.slope);
    }
    return -excess.mass * std::expm1(-gap * std::log(excess.mass)) / excess.slope;
  }

 private:
  /// For alphas such as 4/3, beta is whole but rounding moves it. Restores it: power() is fast there.
  ENTMAXKV_HOST_DEVICE static Real snapped(Real beta) {
    const Real whole = std::floor(beta + Real(0.5));
    return std::fabs(beta - whole) <= 4 * std::numeric_limits<float>::epsilon() * beta ? whole : beta;
  }
};

/// Tells where the search for a threshold ended, and the sums of Excess there.
template <typename Real>
struct Solution {
  Real threshold, mass, slope;
};

/// Finds the threshold by Newton's steps (Entmax::step) from `start`, which must be at or below it. excess_above(t)
/// returns the Excess of all tokens above a trial threshold t. The search ends where a step no longer moves t, or moves
/// it by no more than `least_move`. Trial thresholds only rise, so excess_above may forget what is at or below t.
template <typename Real, typename ExcessAbove>
ENTMAXKV_HOST_DEVICE Solution<Real> find_threshold(const Entmax<Real>& entmax, Real start, Real least_move,
                                                   ExcessAbove excess_above) {
  constexpr int kMostSteps = 64;  // a guard: convergence is quadratic
  Solution<Real> solution{start, 1, 1};
  for (int step = 0; step < kMostSteps; ++step) {
    const auto all = excess_above(solution.threshold);
    solution.mass = static_cast<Real>(all.mass);
    solution.slope = static_cast<Real>(all.slope);
    const Real move = entmax.step({solution.mass, solution.slope});
    const Real next = solution.threshold + move;
    if (!(move > least_move && next > solution.threshold)) break;  // NaN ends the search, too
    solution.threshold = next;
  }
  return solution;
}

}  // namespace entmaxkv
