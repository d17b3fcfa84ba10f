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
  if (t <= 0 || m > kTail * t * beta) {  // so far above the threshold that the spread does not matter
    excess.add(m, beta, count);
    return;
  }
  if (beta <= 3 && beta == std::floor(beta)) {
    // E[y_+^(k+1)] = m E[y_+^k] + k t^2 E[y_+^(k-1)], from Phi and m Phi + t phi.
    const Real r = m / t;
    Real lower = std::erfc(-r * Real(0.70710678118654752)) / 2;
    Real upper = m * lower + t * Real(0.39894228040143268) * std::exp(-r * r / 2);
    for (int k = 1; k < static_cast<int>(beta); ++k) {
      const Real next = m * upper + k * t * t * lower;
      lower = upper;
      upper = next;
    }
    excess.slope += count * (lower > 0 ? lower : 0);
    excess.mass += count * (upper > 0 ? upper : 0);
    return;
  }
  // Gauss-Legendre, 16 points over the part of m +- 6 t that lies above 0.
  constexpr Real kNode[8] = {0.09501250983763744, 0.2816035507792589, 0.45801677765722737, 0.6178762444026438,
                             0.755404408355003,   0.8656312023878318, 0.9445750230732326,  0.9894009349916499};
  constexpr Real kWeight[8] = {0.18945061045506864, 0.18260341504492364, 0.16915651939500265,  0.1495959888165767,
                               0.12462897125553407, 0.0951585116824926,  0.062253523938647456, 0.027152459411754176};
  const Real low = m - kTail * t > 0 ? m - kTail * t : 0;
  const Real half = (m + kTail * t - low) / 2;
  for (int i = 0; i < 16; ++i) {
    const Real y = low + half * (1 + (i < 8 ? kNode[i] : -kNode[i - 8]));
    const Real r = (y - m) / t;
    const Real density = Real(0.39894228040143268) * std::exp(-r * r / 2) / t;
    excess.add(y, beta, count * half * kWeight[i & 7] * density);
  }
}

}  // namespace entmaxkv
