// The threshold that alpha-entmax is expected to have if the scores of each page are normal. Both backends share it.
// Let z be the scores of a page's tokens times alpha-1, and tau a trial threshold. The excesses y = z - tau are then
// normal with mean m and standard deviation t, N(m, t^2). y_+ stands for max(y, 0).
#pragma once

#include "entmax.h"

namespace entmaxkv {

/// What is expected above a trial threshold tau: sums over all tokens of the expectation E of powers of y_+.
template <typename Real>
struct Expected {
  Real mass = 0;   // sum E[y_+^beta]
  Real slope = 0;  // sum E[y_+^(beta-1)]: the derivative of mass by -tau is beta times that
  Real bend = 0;   // (beta-1) sum E[y_+^(beta-2)]: the derivative of slope by -tau

  /// Adds `count` tokens whose excess is y > 0 for certain.
  ENTMAXKV_HOST_DEVICE void add(Real y, Real beta, Real count) {
    const Real derivative = count * power(y, beta - 1);
    mass += derivative * y;
    slope += derivative;
    bend += (beta - 1) * derivative / y;
  }

  ENTMAXKV_HOST_DEVICE friend Expected operator+(const Expected& a, const Expected& b) {
    return {a.mass + b.mass, a.slope + b.slope, a.bend + b.bend};
  }
};

/// The search for the threshold: the tau above which the expected mass is 1. It starts at a tau below the threshold.
template <typename Real>
struct Search {
  Real least;  // the largest tau that is known to be below the threshold
  Real tau = least;
  int steps = 0;

  /// Moves tau, given what is expected above it. Returns whether another step is needed. It is Newton's step on
  /// mass^p = 1. p is chosen between 0 (where log mass takes the place of mass^p) and 1/beta so that mass^p is as
  /// straight as possible at tau: then few steps suffice. Such a step may pass the threshold. With p = 1/beta, a step
  /// from below does not (Entmax::step).
  ENTMAXKV_HOST_DEVICE bool advance(const Entmax<Real>& entmax, const Expected<Real>& above) {
    constexpr int kBold = 8, kMostSteps = 32;
    constexpr Real kStill = sizeof(Real) == 4 ? Real(5e-4) : Real(1e-8);
    if (above.mass > 1) least = tau;
    const Real per_slope = 1 / above.slope, excess = above.mass * per_slope;
    const Real straight = 1 - entmax.gap * excess * (above.bend * per_slope);
    Real p = entmax.gap;
    if (steps < kBold && straight < p) p = straight > p / 16 ? straight : p / 16;
    tau += excess * (1 - std::exp2(-p * std::log2(above.mass))) * (entmax.gap / p);
    if (!(tau > least)) tau = least;  // also if tau is NaN: nothing was above it, or a page is NaN
    // The error after a step is of the order of off^2, where off is the mass that was missing or in excess before it.
    // If pages without spread may come to lie above tau, it is of the order of off^beta.
    const Real off = std::fabs(above.mass - 1);
    return off * (entmax.beta < 2 ? 1 : off) > kStill && ++steps < kMostSteps;
  }
};

/// Whether tokens are so far below the threshold that their expected weight does not count. A normal variable exceeds 6
/// standard deviations with probability 1e-9. Where t >= 1, powers of y can make that part count. The limit is then
/// where the density underflows.
template <typename Real>
ENTMAXKV_HOST_DEVICE inline bool is_out_of_reach(Real m, Real t) {
  return m + (t < 1 ? 6 : sizeof(Real) == 4 ? 12 : 37) * t <= 0;
}

/// Adds `count` tokens with excesses N(m, t^2).
template <typename Real>
ENTMAXKV_HOST_DEVICE inline void add_expected(Expected<Real>& expected, Real m, Real t, Real beta, Real count) {
  if (is_out_of_reach(m, t)) return;
  if (t <= 0 || m > Real(1e6) * t) {  // the spread is too small to matter
    expected.add(m, beta, count);
    return;
  }
  const Real r = m / t;
  if (r > -6 && beta <= 15 && beta == std::floor(beta)) {
    // Let x be standard normal, with density phi and distribution Phi, and A_k = E[(r + x)_+^k] / k!. Then A_-1 =
    // phi(r), A_0 = Phi(r) and k A_k = r A_(k-1) + A_(k-2). For r < 0 the two terms nearly cancel, the more the smaller
    // r is: hence the limit r > -6.
    const int order = static_cast<int>(beta);
    Real lowest = 0, lower = Real(0.39894228040143268) * std::exp(-r * r / 2);  // A_(k-2), A_(k-1)
    Real upper = std::erfc(-r * Real(0.70710678118654752)) / 2;                 // A_k
    for (int k = 1; k <= order; ++k) {
      const Real next = (r * upper + lower) / k;
      lowest = lower;
      lower = upper;
      upper = next;
    }
    for (int k = 1; k < order; ++k) count *= k * t;
    expected.bend += count / t * (lowest > 0 ? lowest : 0);
    expected.slope += count * (lower > 0 ? lower : 0);
    expected.mass += count * order * t * (upper > 0 ? upper : 0);
    return;
  }
  // Otherwise integrate numerically over x, with y = m + t x, by Gauss-Legendre quadrature with 20 points. The range is
  // where y > 0 and x is within 5 of the peak of y^beta phi(x).
  constexpr Real kNode[10] = {0.07652652113349734, 0.22778585114164507, 0.37370608871541955, 0.5108670019508271,
                              0.636053680726515,   0.7463319064601508,  0.8391169718222188,  0.912234428251326,
                              0.9639719272779138,  0.993128599185095};
  constexpr Real kWeight[10] = {0.15275338713072628,  0.14917298647260424, 0.1420961093183824,  0.1316886384491769,
                                0.1181945319615186,   0.1019301198172407,  0.08327674157670471, 0.06267204833410879,
                                0.040601429800386446, 0.017614007139150893};
  const Real root = std::sqrt(r * r + 4 * beta);
  const Real peak = r > 0 ? 2 * beta / (r + root) : (root - r) / 2;
  const Real low = peak - 5 > -r ? peak - 5 : -r;
  const Real half = (peak + 5 - low) / 2;
#ifdef __CUDACC__
#pragma unroll 1  // twenty copies of pow() would need more registers than a thread has
#endif
  for (int i = 0; i < 20; ++i) {
    const Real x = low + half * (1 + (i < 10 ? kNode[i] : -kNode[i - 10]));
    const Real density = Real(0.39894228040143268) * std::exp(-x * x / 2);
    expected.add(m + t * x, beta, count * half * kWeight[i % 10] * density);
  }
}

}  // namespace entmaxkv
