#pragma once
// Floating-point storage types of the kernels, and the one switch over them. No torch here.
#include <bit>
#include <cstdint>

namespace secateur {

enum class Dtype : int32_t { Float, BFloat16, Half, Double };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// What a storage type is computed in: double stays double, everything else is float.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <>
struct ComputeType<uint32_t> {  // two neighbouring bfloat16 that a kernel multiplies as one
  using type = uint32_t;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

// Everything below has internal linkage: cpu.cpp files are compiled for several instruction sets,
// and the linker must never share one copy between them. constexpr, so that nvcc takes it for the
// device as well (--expt-relaxed-constexpr).
namespace {

constexpr uint32_t widen(uint32_t x) { return x; }
constexpr float widen(float x) { return x; }
constexpr double widen(double x) { return x; }
constexpr float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
constexpr float widen(Half x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u)  // normal: rebias the exponent from 15 to 127
    return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: magnitude * 2^-24 is exact.
  const float value = static_cast<float>(magnitude) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
template <typename T>
constexpr T narrow(Compute<T> x);
template <>
constexpr float narrow<float>(float x) {
  return x;
}
template <>
constexpr double narrow<double>(double x) {
  return x;
}
template <>
constexpr BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
constexpr Half narrow<Half>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 31 << 15);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal; adding 0.5 aligns the mantissa
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13)};
}

// Calls f.template operator()<T>() for the storage type T of `dtype`.
template <typename F>
inline auto for_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::BFloat16:
      return f.template operator()<BFloat16>();
    case Dtype::Half:
      return f.template operator()<Half>();
    case Dtype::Double:
      return f.template operator()<double>();
    default:
      return f.template operator()<float>();
  }
}

}  // namespace
}  // namespace secateur
