// Moments of a Gaussian's positive part, which both backends share: what alpha-entmax expects of a page whose
// excesses y = z - tau follow N(m, t^2).
#pragma once

#include "entmax.h"

namespace entmaxkv {

/// Adds count E[y_+^beta] and count E[y_+^(beta-1)].
template <typename Real>
ENTMAXKV_HOST_DEVICE inline void add_expected(Excess<Real>& excess, Real m, Real t, Real beta, Real count) {
  constexpr Real kTail = 6;  // standard deviations; 1e-9 of the weight lies beyond
  if (m + kTail * t <= 0) return;
  if (t <= 0 || m > Real(1e6) * t) {  // the spread does not matter
    excess.add(m, beta, count);
    return;
  }
  const Real r = m / t;
  if (beta <= 15 && beta == std::floor(beta)) {
    // A_k = E[(r + x)_+^k] / k! of a standard normal x: A_-1 = phi(r), A_0 = Phi(r), k A_k = r A_(k-1) + A_(k-2).
    const int order = static_cast<int>(beta);
    const Real density = Real(0.39894228040143268) * std::exp(-r * r / 2);
    Real lower = 0, upper = 0;  // A_(order-1), A_order
    constexpr Real kSteep = sizeof(Real) == 4 ? -2 : -kTail;
    if (r > kSteep) {
      lower = density;
      upper = std::erfc(-r * Real(0.70710678118654752)) / 2;
      for (int k = 1; k <= order; ++k) {
        const Real next = (r * upper + lower) / k;
        lower = upper;
        upper = next;
      }
    } else {
      // Upwards these are differences of ever closer numbers, too close for fp32. Downwards all terms are positive
      // (Miller's algorithm). From 12 orders more, with the ratio that the recurrence keeps there, the relative error
      // is 2e-6 at most.
      const int first = order + 12;
      Real now = 1, above = (r + std::sqrt(r * r + 4 * (first + 2))) / (2 * (first + 2));
      for (int k = first; k >= 0; --k) {
        if (k == order) upper = now;
        if (k == order - 1) lower = now;
        const Real next = (k + 1) * above - r * now;
        above = now;
        now = next;
      }
      lower *= density / now;
      upper *= density / now;
    }
    for (int k = 1; k < order; ++k) count *= k * t;
    excess.slope += count * (lower > 0 ? lower : 0);
    excess.mass += count * order * t * (upper > 0 ? upper : 0);
    return;
  }
  // With y = m + t x: Gauss-Legendre, 20 points over x within 5 of where y^beta phi(x) peaks, and y > 0.
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
    excess.add(m + t * x, beta, count * half * kWeight[i % 10] * density);
  }
}

}  // namespace entmaxkv
