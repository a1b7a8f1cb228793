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
#include <utility>

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
      // maskz: gcc 12 warns of the undefined source operand in the plain form.
      return reinterpret_cast<Vec<float, N>>(
          _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#endif
#if defined(__F16C__)
    if constexpr (N % 8 == 0) {
      Vec<float, N> v;
      for (int i = 0; i < N; i += 8) {
        const __m256 part =
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
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
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // narrow<BFloat16>, lane by lane
    const auto bits = reinterpret_cast<Vec<uint32_t, N>>(v);
    const auto quiet = (bits >> 16) | 0x40u;
    const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const auto half = __builtin_convertvector(nan ? quiet : rounded, Vec<uint16_t, N>);
    std::memcpy(p, &half, sizeof(half));
  } else {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
      const __m256i half =
          _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
      return;
    }
#endif
#if defined(__F16C__)
    if constexpr (N % 8 == 0) {
      for (int i = 0; i < N; i += 8) {
        __m256 part;
        std::memcpy(&part, reinterpret_cast<const char*>(&v) + i * sizeof(float), sizeof(part));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i),
                         _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
      }
      return;
    }
#endif
    for (int i = 0; i < N; ++i) p[i] = narrow<T>(v[i]);
  }
}

// The same, but that bfloat16 below the normal range may become zero, as in multiply_add() of
// pairs.
template <int N, typename T>
inline void store_flushed(T* p, Vec<Compute<T>, N> v) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16> && N == 16) {
    const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    std::memcpy(p, &half, sizeof(half));
    return;
  }
#endif
  store<N>(p, v);
}

// The first `count` lanes only, 0 <= count <= N.
template <int N, typename T>
inline void store_first(T* p, Vec<Compute<T>, N> v, int64_t count) {
  if (count >= N) return store<N>(p, v);
  T lanes[N];
  store<N>(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// The first `count` lanes, zero in the others, 0 <= count <= N.
template <int N, typename T>
inline Vec<Compute<T>, N> load_first(const T* p, int64_t count) {
  if (count >= N) return load<N>(p);
  T lanes[N] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load<N>(lanes);
}

template <typename V, typename T>
inline V broadcast(T x) {
  return x - V{};  // exact, and free; x + 0 would be an addition that turns -0 into +0
}

// acc + left * right. Lanes of uint32_t are pairs of bfloat16 whose two products are added, for
// which the machine needs an instruction: see kHasPairs.
template <typename C, int N, typename E>
inline Vec<C, N> multiply_add(Vec<C, N> acc, Vec<E, N> left, Vec<E, N> right) {
  if constexpr (std::is_same_v<C, E>) {
    return acc + left * right;
  } else {
#if defined(__AVX512BF16__)
    static_assert(std::is_same_v<C, float> && std::is_same_v<E, uint32_t> && (N == 8 || N == 16));
    if constexpr (N == 16)
      return reinterpret_cast<Vec<C, N>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc),
                                                          reinterpret_cast<__m512bh>(left),
                                                          reinterpret_cast<__m512bh>(right)));
    else
      return reinterpret_cast<Vec<C, N>>(_mm256_dpbf16_ps(reinterpret_cast<__m256>(acc),
                                                          reinterpret_cast<__m256bh>(left),
                                                          reinterpret_cast<__m256bh>(right)));
#else
    static_assert(std::is_same_v<C, E>, "only where kHasPairs");
#endif
  }
}
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Calls f(std::integral_constant<int, i>) for i in [0, N): what f indexes with i stays in
// registers.
template <int N, typename F>
__attribute__((always_inline)) inline void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

template <int D, typename V>
inline V lower_half(V a, V b) {  // a where bit D is clear; b, moved by D, where it is set
  constexpr int n = sizeof(V) / sizeof(a[0]);
  return [&]<int... L>(std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(a, b, ((L & D) ? n + (L ^ D) : L)...);
  }(std::make_integer_sequence<int, n>{});
}
template <int D, typename V>
inline V upper_half(V a, V b) {  // a, moved by D, where bit D is clear; b where it is set
  constexpr int n = sizeof(V) / sizeof(a[0]);
  return [&]<int... L>(std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(a, b, ((L & D) ? n + L : (L ^ D))...);
  }(std::make_integer_sequence<int, n>{});
}

// In-place transpose of N vectors of N lanes.
template <typename T, int N, int D = 1>
__attribute__((always_inline)) inline void transpose(Vec<T, N> (&v)[N]) {
  if constexpr (D < N) {
    unroll<N>([&](auto i) __attribute__((always_inline)) {
      if constexpr (!(i & D)) {
        const Vec<T, N> a = v[i], b = v[i + D];
        v[i] = lower_half<D>(a, b);
        v[i + D] = upper_half<D>(a, b);
      }
    });
    transpose<T, N, 2 * D>(v);
  }
}

// Lane l is a[l] + a[l ^ D] where bit D of l is clear, b[l] + b[l ^ D] where it is set.
template <int D, typename V>
inline V select_sum(V a, V b) {
  constexpr int n = sizeof(V) / sizeof(a[0]);
  return [&]<int... L>(std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(a, b, ((L & D) ? n + L : L)...) +
           __builtin_shufflevector(a, b, ((L & D) ? n + (L ^ D) : (L ^ D))...);
  }(std::make_integer_sequence<int, n>{});
}

// Lane i of the result is the sum of the lanes of v[i]; v is overwritten.
template <typename T, int N, int D = 1>
__attribute__((always_inline)) inline Vec<T, N> sum_each(Vec<T, N> (&v)[N]) {
  if constexpr (D < N) {
    unroll<N>([&](auto i) __attribute__((always_inline)) {
      if constexpr (i % (2 * D) == 0) v[i] = select_sum<D>(v[i], v[i + D]);
    });
    return sum_each<T, N, 2 * D>(v);
  } else {
    return v[0];
  }
}

// Bit i is set where a[i] > b[i]; N lanes of a signed integer make one machine vector.
template <int N, typename T>
inline uint32_t bits_greater(Vec<T, N> a, Vec<T, N> b) {
  static_assert(std::is_signed_v<T> && sizeof(a) == kVectorBytes);
#if defined(__AVX512F__)
  const auto x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  if constexpr (sizeof(T) == 4)
    return _mm512_cmpgt_epi32_mask(x, y);
  else
    return _mm512_cmpgt_epi64_mask(x, y);
#else
  const auto truth = a > b;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(truth)));
  else
    return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(truth)));
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(truth)));
  else
    return static_cast<uint32_t>(_mm_movemask_pd(reinterpret_cast<__m128d>(truth)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < N; ++i) bits |= static_cast<uint32_t>(truth[i] & 1) << i;
  return bits;
#endif
#endif
}

}  // namespace
}  // namespace secateur
