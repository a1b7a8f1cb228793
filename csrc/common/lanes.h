#pragma once
// What one formula needs to serve a scalar and a SIMD vector alike: with these, comparison and ?:,
// the same source gives the same bits in a CPU vector, in its scalar tail and in a CUDA thread.
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define SECATEUR_HD __host__ __device__ inline
#else
#include "common/simd.h"
#define SECATEUR_HD inline
#endif

namespace secateur {
namespace {

// Scalar: the type of one lane. Word, Int: the unsigned and signed integer (lanes) of its width.
// Index: uint32_t (lanes), as many as V has.
template <typename V>
struct Lanes {
  using Scalar = V;
  using Word = std::conditional_t<sizeof(V) == 4, uint32_t, uint64_t>;
  using Int = std::make_signed_t<Word>;
  using Index = uint32_t;
};

#if !defined(__CUDACC__)
template <typename V>
  requires(!std::is_arithmetic_v<V>)
struct Lanes<V> {
  using Scalar = std::remove_cvref_t<decltype(V{}[0])>;
  static constexpr int kCount = sizeof(V) / sizeof(Scalar);
  using Word = Vec<typename Lanes<Scalar>::Word, kCount>;
  using Int = Vec<typename Lanes<Scalar>::Int, kCount>;
  using Index = Vec<uint32_t, kCount>;
};
#endif

template <typename V>
using Scalar = typename Lanes<V>::Scalar;
template <typename V>
using Word = typename Lanes<V>::Word;
template <typename V>
using Int = typename Lanes<V>::Int;

// The bits of `x` as another type of the same size.
template <typename To, typename From>
SECATEUR_HD To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// Each lane converted by value.
template <typename To, typename From>
SECATEUR_HD To convert(From x) {
#if !defined(__CUDACC__)
  if constexpr (!std::is_arithmetic_v<To>) return __builtin_convertvector(x, To);
#endif
  if constexpr (std::is_arithmetic_v<To>) return static_cast<To>(x);
}

// 0, 1, 2, ... in the lanes of an integer type.
template <typename U>
SECATEUR_HD U iota() {
  U x{};
#if !defined(__CUDACC__)
  if constexpr (!std::is_arithmetic_v<U>)
    for (unsigned i = 0; i < sizeof(U) / sizeof(Scalar<U>); ++i) x[i] = i;
#endif
  return x;
}

}  // namespace
}  // namespace secateur
