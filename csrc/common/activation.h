#pragma once
// Activations, as torch.nn.functional defines them.
#include <cmath>

#include "common/lanes.h"

namespace secateur {

namespace {

template <typename V>
SECATEUR_HD V relu(V x) {
  return x < Scalar<V>{0} ? V{} : x;  // NaN stays NaN
}

// x times the normal distribution's Phi(x). In fp32 erf is a quotient of polynomials in x^2 (the
// minimax coefficients of Eigen's erf), off by at most 2e-7 of what erf is at its largest.
template <typename V>
SECATEUR_HD V gelu(V x) {
  using S = Scalar<V>;
  if constexpr (sizeof(S) == 8) {
    const auto one = [](S t) { return t * (S{0.5} * std::erfc(-t * S{0.70710678118654752})); };
    if constexpr (std::is_arithmetic_v<V>) {
      return one(x);
    } else {
      V y;
      for (int i = 0; i < Lanes<V>::kCount; ++i) y[i] = one(x[i]);
      return y;
    }
  } else {
    const V scaled = x * S{0.70710678f};
    const V low = scaled < S{-4} ? V{} - S{4} : scaled;  // erf is 1 in fp32 from 4 on
    const V z = low > S{4} ? V{} + S{4} : low;
    const V t = z * z;
    V p = t * S{-2.72614225801306e-10f} + S{2.77068142495902e-08f};
    p = p * t + S{-2.10102402082508e-06f};
    p = p * t + S{-5.69250639462346e-05f};
    p = p * t + S{-7.34990630326855e-04f};
    p = p * t + S{-2.95459980854025e-03f};
    p = p * t + S{-1.60960333262415e-02f};
    V q = t * S{-1.45660718464996e-05f} + S{-2.13374055278905e-04f};
    q = q * t + S{-1.68282697438203e-03f};
    q = q * t + S{-7.37332916720468e-03f};
    q = q * t + S{-1.42647390514189e-02f};
    return x * (S{0.5f} + S{0.5f} * (z * p / q));
  }
}

}  // namespace
}  // namespace secateur
