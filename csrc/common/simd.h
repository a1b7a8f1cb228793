#pragma once
// Portable SIMD through the compiler's vector extensions; intrinsics only under their #ifdef.
// Vec<T, N> is N lanes of T with +, -, *, /, comparisons, ?: and []; the compiler splits a vector
// wider than the machine's, so code written for N lanes rounds alike on every instruction set.
// Included by cpu.cpp files only: internal linkage keeps each instruction set's copy its own.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"

namespace secateur {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <typename T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vec = typename VecOf<T, N>::type;

// Lanes of T in one machine vector.
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// N elements of storage type T from unaligned memory, widened to the compute type.
template <int N, typename T>
inline Vec<Compute<T>, N> load(const T* p) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    Vec<T, N> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Vec<uint16_t, N> bits;
    std::memcpy(&bits, p, sizeof(bits));
    const auto wide = __builtin_convertvector(bits, Vec<uint32_t, N>) << 16;
    return reinterpret_cast<Vec<float, N>>(wide);
  } else {
#if defined(__AVX512F__)
    if constexpr (N == 16)
      return reinterpret_cast<Vec<float, N>>(
          // Not _mm512_cvtph_ps: GCC 12 warns of the undefined register in its header.
          _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#endif
#if defined(__F16C__)
    if constexpr (N % 8 == 0) {
      Vec<float, N> v;
      for (int i = 0; i < N; i += 8) {
        const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
        std::memcpy(reinterpret_cast<char*>(&v) + i * sizeof(float), &part, sizeof(part));
      }
      return v;
    }
#endif
    Vec<float, N> v{};
    for (int i = 0; i < N; ++i) v[i] = widen(p[i]);
    return v;
  }
}

// Rounds to nearest even on the way to storage type T; unaligned memory.
template <int N, typename T>
inline void store(T* p, Vec<Compute<T>, N> v) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    std::memcpy(p, &v, sizeof(v));
  } else {
    for (int i = 0; i < N; ++i) p[i] = narrow<T>(v[i]);
  }
}

template <typename V, typename T>
inline V broadcast(T x) {
  return V{} + x;
}

// Bit i is set where lane i of a comparison's result is true; N lanes make one machine vector.
template <int N, typename T>
inline uint32_t bits_of(Vec<T, N> truth) {
#if defined(__AVX512F__)
  if constexpr (sizeof(truth) == 64 && sizeof(T) == 4)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(truth));
  if constexpr (sizeof(truth) == 64 && sizeof(T) == 8)
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(truth));
#elif defined(__AVX2__)
  if constexpr (sizeof(truth) == 32 && sizeof(T) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(truth)));
  if constexpr (sizeof(truth) == 32 && sizeof(T) == 8)
    return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(truth)));
#elif defined(__x86_64__)
  if constexpr (sizeof(truth) == 16 && sizeof(T) == 4)
    return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(truth)));
  if constexpr (sizeof(truth) == 16 && sizeof(T) == 8)
    return static_cast<uint32_t>(_mm_movemask_pd(reinterpret_cast<__m128d>(truth)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < N; ++i) bits |= static_cast<uint32_t>(truth[i] & 1) << i;
  return bits;
#endif
}

}  // namespace
}  // namespace secateur
