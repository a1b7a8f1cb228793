#pragma once
// The one definition of every score formula and block reduction, shared by every device: V is a
// scalar or a vector of lanes. Score code is compiled without contraction, and every operation
// below is correctly rounded by itself, so a score has the same bits wherever it is computed.
#include <cstdint>

#include "common/formula.h"
#include "common/lanes.h"

namespace secateur {

namespace {

template <typename V>
SECATEUR_HD V absolute(V x) {
  constexpr Word<Scalar<V>> sign = Word<Scalar<V>>{1} << (sizeof(Scalar<V>) * 8 - 1);
  return bits_as<V>(bits_as<Word<V>>(x) & ~sign);
}

// Natural logarithm of a positive finite x, subnormals included; within 1 ulp.
// x = 2^k * m with m in [sqrt(1/2), sqrt(2)); with f = m - 1 and s = f / (2 + f),
// log(m) = f - f^2/2 + s * (f^2/2 + R(s^2)), R an even polynomial (FreeBSD msun, e_log.c).
template <typename V>
SECATEUR_HD V logarithm(V x) {
  using T = Scalar<V>;
  using U = Word<T>;
  constexpr bool wide = sizeof(T) == 8;
  constexpr int mantissa = wide ? 52 : 23;
  constexpr U one = wide ? U(0x3ff0000000000000u) : U(0x3f800000u);
  constexpr U root_half = wide ? U(0x3fe6a09e00000000u) : U(0x3f3504f3u);
  constexpr T smallest_normal = wide ? T(0x1p-1022) : T(0x1p-126f);
  constexpr int subnormal_shift = mantissa + 2;
  constexpr T subnormal_scale = wide ? T(0x1p54) : T(0x1p25f);

  const auto subnormal = x < V{} + smallest_normal;
  const V scaled = subnormal ? x * subnormal_scale : x;
  const Word<V> bits = bits_as<Word<V>>(scaled) + (one - root_half);
  const Word<V> exponent = (bits >> mantissa) - (one >> mantissa);
  const V m = bits_as<V>((bits & ((U{1} << mantissa) - 1)) + root_half);
  V k = convert<V>(bits_as<Int<V>>(exponent));
  k = subnormal ? k - T(subnormal_shift) : k;

  const V f = m - T(1);
  const V s = f / (f + T(2));
  const V z = s * s;
  const V w = z * z;
  const V half_square = f * f * T(0.5);
  V even, odd, ln2_high, ln2_low;
  if constexpr (wide) {
    odd = z * (w * (w * (w * T(1.479819860511658591e-01) + T(1.818357216161805012e-01)) +
                    T(2.857142874366239149e-01)) +
               T(6.666666666666735130e-01));
    even = w * (w * (w * T(1.531383769920937332e-01) + T(2.222219843214978396e-01)) +
                T(3.999999999940941908e-01));
    ln2_high = V{} + T(6.93147180369123816490e-01);
    ln2_low = V{} + T(1.90821492927058770002e-10);
  } else {
    odd = z * (w * T(0x91e9ee.0p-25f) + T(0xaaaaaa.0p-24f));
    even = w * (w * T(0xf89e26.0p-26f) + T(0xccce13.0p-25f));
    ln2_high = V{} + T(6.9313812256e-01f);
    ln2_low = V{} + T(9.0580006145e-06f);
  }
  return s * (half_square + (odd + even)) + k * ln2_low - half_square + f + k * ln2_high;
}

// A full-avalanche mix of 32 bits.
template <typename U>
SECATEUR_HD U mix(U x) {
  x = (x ^ x >> 16) * 0x21f0aaadu;
  x = (x ^ x >> 15) * 0xd35a2d97u;
  return x ^ x >> 15;
}

// 24 pseudo-random bits of (seed, index) as a number in [0, 1); `index` is the first lane's, the
// next lanes count up from it.
template <typename V>
SECATEUR_HD V random_unit(uint64_t seed, uint64_t index) {
  using Index = typename Lanes<V>::Index;
  const Index low = iota<Index>() + static_cast<uint32_t>(index);
  Index high = Index{} + static_cast<uint32_t>(index >> 32);
  // Lanes that wrapped around carry into the high word.
  high = low < Index{} + static_cast<uint32_t>(index) ? high + 1u : high;
  const uint32_t seed_low = static_cast<uint32_t>(seed);
  const uint32_t seed_high = static_cast<uint32_t>(seed >> 32);
  const uint32_t key = mix(seed_low + mix(seed_high + 0x9e3779b9u));
  const uint32_t second_key = mix(seed_high + mix(seed_low + 0x85ebca6bu));
  const Index first = mix(low ^ key);
  const Index second = mix(first + mix(high ^ second_key));
  return convert<V>(second >> 8) * Scalar<V>(0x1p-24);
}

// What is measured now. `w` and `g` are read only where needs_weight() and needs_grad() say so.
template <Formula F, typename V>
SECATEUR_HD V observe(V w, V g, const ScoreParams& p, int64_t index) {
  using T = Scalar<V>;
  if constexpr (F == Formula::Given) return w;
  if constexpr (F == Formula::Magnitude) return absolute(w);
  if constexpr (F == Formula::Gradient) return absolute(g);
  if constexpr (F == Formula::Taylor) return absolute(g * w);
  if constexpr (F == Formula::TaylorSquared) {
    const V product = g * w;
    return product * product;
  }
  if constexpr (F == Formula::HessianDiagonal || F == Formula::Obd) return g * g;
  if constexpr (F == Formula::Entropy) {
    const V share = absolute(w) / static_cast<T>(p.normalizer);
    return share == V{} ? V{} : -(share * logarithm(share));
  }
  if constexpr (F == Formula::Movement) return -(g * w);
  if constexpr (F == Formula::Random) return random_unit<V>(p.seed, static_cast<uint64_t>(index));
}

// The score from a measured or averaged x.
template <Formula F, typename V>
SECATEUR_HD V finish(V x, V w) {
  if constexpr (F == Formula::Obd)
    return x * (w * w) * Scalar<V>(0.5);
  else
    return x;
}

// x from a state, by Mode::State.
template <typename V>
SECATEUR_HD V recall(V state, const ScoreParams& p) {
  return state / static_cast<Scalar<V>>(p.normalizer);
}

// The new state, and x, by Mode::Update, from what is measured now.
template <typename V>
SECATEUR_HD V average(V state, V observed, const ScoreParams& p) {
  using T = Scalar<V>;
  return state * static_cast<T>(p.decay) + observed * static_cast<T>(p.gain);
}

// One element of a score; `state` is read and written as `M` says.
template <Formula F, Mode M, typename V>
SECATEUR_HD V score(V w, V g, V& state, const ScoreParams& p, int64_t index) {
  if constexpr (M == Mode::State) return finish<F>(recall(state, p), w);
  const V x = observe<F>(w, g, p, index);
  if constexpr (M == Mode::Observe) return finish<F>(x, w);
  state = average(state, x, p);
  return finish<F>(state, w);
}

// A block is reduced by one tree on every device: down each column in row order, then lane j of
// kReduceLanes takes columns j, j + kReduceLanes, ... in order, then the lanes are halved. What a
// column or a lane starts from is identity().
constexpr int kLogReduceLanes = 4;
constexpr int kReduceLanes = 1 << kLogReduceLanes;

template <typename T>
SECATEUR_HD T identity(Reduce reduce) {
  return reduce == Reduce::Max ? -static_cast<T>(__builtin_inff()) : T(0);
}

// What an element brings into the reduction.
template <Reduce R, typename V>
SECATEUR_HD V enter(V x) {
  if constexpr (R == Reduce::L2)
    return x * x;
  else
    return x;
}

template <Reduce R, typename V>
SECATEUR_HD V combine(V a, V b) {
  if constexpr (R == Reduce::Max)
    return (a > b) | (a != a) ? a : b;  // NaN wins
  else
    return a + b;
}

// The block's score; `count` elements went in.
template <Reduce R, typename T>
SECATEUR_HD T leave(T x, int64_t count) {
  if constexpr (R == Reduce::Mean) return x / static_cast<T>(count);
  if constexpr (R == Reduce::L2) {
    if constexpr (sizeof(T) == 8)
      return __builtin_sqrt(x);
    else
      return __builtin_sqrtf(x);
  }
  return x;
}

// Calls f.template operator()<F>() for the formula.
template <typename Fn>
SECATEUR_HD void for_formula(Formula formula, Fn&& f) {
  switch (formula) {
    case Formula::Given:
      return f.template operator()<Formula::Given>();
    case Formula::Magnitude:
      return f.template operator()<Formula::Magnitude>();
    case Formula::Gradient:
      return f.template operator()<Formula::Gradient>();
    case Formula::Taylor:
      return f.template operator()<Formula::Taylor>();
    case Formula::TaylorSquared:
      return f.template operator()<Formula::TaylorSquared>();
    case Formula::HessianDiagonal:
      return f.template operator()<Formula::HessianDiagonal>();
    case Formula::Obd:
      return f.template operator()<Formula::Obd>();
    case Formula::Entropy:
      return f.template operator()<Formula::Entropy>();
    case Formula::Movement:
      return f.template operator()<Formula::Movement>();
    case Formula::Random:
      return f.template operator()<Formula::Random>();
  }
}

// The same for the mode.
template <typename Fn>
SECATEUR_HD void for_mode(Mode mode, Fn&& f) {
  switch (mode) {
    case Mode::Observe:
      return f.template operator()<Mode::Observe>();
    case Mode::State:
      return f.template operator()<Mode::State>();
    case Mode::Update:
      return f.template operator()<Mode::Update>();
  }
}

// The same for the reduction.
template <typename Fn>
SECATEUR_HD void for_reduce(Reduce reduce, Fn&& f) {
  switch (reduce) {
    case Reduce::Sum:
      return f.template operator()<Reduce::Sum>();
    case Reduce::Mean:
      return f.template operator()<Reduce::Mean>();
    case Reduce::Max:
      return f.template operator()<Reduce::Max>();
    case Reduce::L2:
      return f.template operator()<Reduce::L2>();
  }
}

}  // namespace
}  // namespace secateur
