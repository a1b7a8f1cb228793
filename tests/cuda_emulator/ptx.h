#pragma once
// What C++ that ptx/ made of PTX is written in: the types, the memory and the instructions of
// PTX, as the PTX ISA defines them. Registers are unsigned integers of their width, predicates are
// bool.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "atomics.h"
#include "collectives.h"
#include "emulator.h"
#include "tensor_cores.h"

namespace cuda_emulator::ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using u128 = unsigned __int128;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

// What a register holds that nothing was written to.
constexpr u64 kGarbage = 0xffc0deadffc0deadu;

// Memory. Generic addresses are addresses of this process. Those of shared memory count from the
// array of dynamic shared memory, with a sign; 32 bits are enough for whatever a library contains.

inline u64 address_of(const void* memory) { return reinterpret_cast<u64>(memory); }
inline char* pointer_to(u64 address) { return reinterpret_cast<char*>(address); }
inline u64 shared_window() { return address_of(dynamic_shared()); }
inline u64 from_shared(u64 window, u32 address) {
  return window + static_cast<u64>(static_cast<s64>(static_cast<s32>(address)));
}

// A `.shared` array: no more aligned than declared, and nothing else close behind it.
template <size_t kBytes, size_t kAlignment>
struct SharedArray {
  static constexpr size_t kLine = 128;
  static_assert(kAlignment <= kLine);
  alignas(kLine) char before[kAlignment];
  char bytes[kBytes];
  char behind[kLine];

  void open(const char* name) { open_shared(bytes, kBytes, name); }
  u32 address() const { return static_cast<u32>(address_of(bytes) - shared_window()); }
};

// Memory that an instruction reads or writes, once it is known that it may. Never inlined: where
// they return to is where the checker says an access is.
char* load(u64 address, unsigned bytes);
char* load_read_only(u64 address, unsigned bytes);
char* store(u64 address, unsigned bytes);
void check_alignment(u64 address, unsigned bytes, const void* program_counter);
[[noreturn]] void out_of_local(const void* program_counter);

// The same for a `.local` array of the function, which belongs to this thread alone.
template <size_t kBytes>
[[gnu::noinline]] char* local(u64 address, unsigned bytes, char (&array)[kBytes]) {
  check_alignment(address, bytes, __builtin_return_address(0));
  const u64 offset = address - address_of(array);
  if (offset > kBytes || kBytes - offset < bytes) out_of_local(__builtin_return_address(0));
  return array + offset;
}

// atom and red: what memory held before, which becomes change(before).
template <typename T, typename Change>
[[gnu::noinline]] T atomic(u64 address, Change change) {
  check_alignment(address, sizeof(T), __builtin_return_address(0));
  T* const memory = reinterpret_cast<T*>(address);
  before_atomic(memory, sizeof(T), __builtin_return_address(0));
  const T before = *memory;
  *memory = change(before);
  return before;
}

// Integers.

template <typename T>
constexpr u32 kBits = sizeof(T) * 8;

template <typename T>
T shl(T a, u32 count) {
  return count < kBits<T> ? static_cast<T>(a << count) : T{0};
}
template <typename T>
T shr(T a, u32 count) {
  return static_cast<T>(count < kBits<T> ? a >> count : a < 0 ? -1 : 0);
}
// 32 bits of high:low, shifted by at most 32.
inline u32 funnel_left(u32 low, u32 high, u32 count) {
  return static_cast<u32>((u64{high} << 32 | low) << count >> 32);
}
inline u32 funnel_right(u32 low, u32 high, u32 count) {
  return static_cast<u32>((u64{high} << 32 | low) >> count);
}

template <typename T>
T mul_hi(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> kBits<T>);
}

// PTX leaves both open, and a CPU traps.
template <typename T>
void check_divisor(T b, Site site) {
  if (b == 0) fail("division by 0 at %s:%d", site.file, site.line);
}
template <typename T>
T divide(T a, T b, Site site = here()) {
  check_divisor(b, site);
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(-a)
                                                        : static_cast<T>(a / b);
}
template <typename T>
T remainder(T a, T b, Site site = here()) {
  check_divisor(b, site);
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
}

template <typename T>
T reverse_bits(T a) {
  T reversed = 0;
  for (u32 i = 0; i < kBits<T>; ++i) reversed |= (a >> i & T{1}) << (kBits<T> - 1 - i);
  return reversed;
}
// The highest bit that is not like the sign.
template <typename T>
u32 bfind(T a) {
  using U = std::make_unsigned_t<T>;
  const U bits = static_cast<U>(a < 0 ? ~a : a);
  return bits ? kBits<T> - 1 - static_cast<u32>(std::countl_zero(bits)) : ~0u;
}
// By how much to shift left to make it the highest.
template <typename T>
u32 bfind_shift(T a) {
  const u32 position = bfind(a);
  return position == ~0u ? position : kBits<T> - 1 - position;
}
template <typename U>
U low_bits(u32 count) {
  return count < kBits<U> ? static_cast<U>((U{1} << count) - 1) : static_cast<U>(~U{0});
}
// `length` bits of `a` from `position` on, as many as there are; the sign above them.
template <typename T>
T bfe(T a, u32 position, u32 length) {
  using U = std::make_unsigned_t<T>;
  position &= 255;
  length &= 255;
  const U bits = static_cast<U>(a);
  const U mask = low_bits<U>(position < kBits<T> ? std::min(length, kBits<T> - position) : 0);
  const U field = shr(bits, position) & mask;
  const u32 top = std::min(position + length - 1, kBits<T> - 1);
  const bool negative = std::is_signed_v<T> && length > 0 && (bits >> top & 1);
  return static_cast<T>(negative ? field | ~mask : field);
}
// `b` with the low `length` bits of `a` from `position` on.
template <typename U>
U bfi(U a, U b, u32 position, u32 length) {
  const U mask = shl(low_bits<U>(length & 255), position & 255);
  return (b & ~mask) | (shl(a, position & 255) & mask);
}
inline u32 bmsk_clamp(u32 position, u32 length) { return shl(low_bits<u32>(length), position); }
// Of the bytes of b:a, those that the nibbles of the selector name; with bit 3, their sign.
inline u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64{b} << 32 | a;
  u32 picked = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 nibble = selector >> 4 * i & 15;
    const u32 byte = static_cast<u32>(bytes >> 8 * (nibble & 7)) & 255;
    picked |= (nibble & 8 ? (byte >> 7) * 255 : byte) << 8 * i;
  }
  return picked;
}
// Bit i of the table is the result for a = i >> 2, b = i >> 1, c = i.
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

// Floating point. What is not here is an operator of C++, which rounds to nearest even; nothing is
// contracted (build.py).

template <typename F>
bool unordered(F a, F b) {
  return std::isnan(a) || std::isnan(b);
}
// Of a NaN and a number the number; of zeros the one whose sign the name says.
template <typename F>
F minimum(F a, F b) {
  if (unordered(a, b)) return std::isnan(a) ? b : a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <typename F>
F maximum(F a, F b) {
  if (unordered(a, b)) return std::isnan(a) ? b : a;
  return a > b || (a == b && std::signbit(b)) ? a : b;
}
// rcp.approx.ftz.f64: only the upper halves count.
inline f64 gross_reciprocal(f64 a) {
  const auto upper = [](f64 x) {
    return std::bit_cast<f64>(std::bit_cast<u64>(x) & 0xffffffff00000000u);
  };
  const auto flush = [](f64 x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0, x) : x;
  };
  return flush(upper(1 / flush(upper(a))));
}
// .ftz
inline f32 flush(f32 a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0f, a) : a; }
// .sat
inline f32 saturate(f32 a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; }
// fma.rm of floats, whose product is exact in double: the sum of two doubles and what it is off by
// say where the sum lies.
inline f32 fma_down(f32 a, f32 b, f32 c) {
  const f64 product = static_cast<f64>(a) * b, sum = product + c;
  if (sum == 0) return std::signbit(product) || std::signbit(c) ? -0.0f : 0.0f;
  const f64 part = sum - product, error = (product - (sum - part)) + (c - part);
  const f32 rounded = static_cast<f32>(sum);
  const bool above = rounded > sum || (rounded == sum && error < 0);
  return above ? std::nextafter(rounded, -std::numeric_limits<f32>::infinity()) : rounded;
}
// fma.rz
inline f32 fma_to_zero(f32 a, f32 b, f32 c) {
  const f32 nearest = std::fma(a, b, c);
  if (nearest == 0) return nearest;
  return nearest < 0 ? -fma_down(-a, b, -c) : fma_down(a, b, c);
}

// cvt to an integer type, of a value that is whole already: what is too large becomes the nearest
// there is, NaN becomes 0, or 2^63 where 64 bits are involved.
template <typename I, typename F>
I to_integer(F whole) {
  using Limits = std::numeric_limits<I>;
  if (std::isnan(whole))
    return sizeof(F) == 8 || sizeof(I) == 8 ? static_cast<I>(u64{1} << (kBits<I> - 1)) : I{0};
  if (whole <= static_cast<F>(Limits::min())) return Limits::min();
  // The largest integer plus 1 is exact in any format.
  if (whole >= std::ldexp(F{1}, Limits::digits)) return Limits::max();
  return static_cast<I>(whole);
}

constexpr u16 kHalfNaN = 0x7fff;  // of bfloat16 as well
inline f32 widen_f16(u16 a) { return static_cast<f32>(std::bit_cast<_Float16>(a)); }
inline f32 widen_bf16(u16 a) { return std::bit_cast<f32>(u32{a} << 16); }
template <typename F>
u16 narrow_f16(F a) {
  return std::isnan(a) ? kHalfNaN : std::bit_cast<u16>(static_cast<_Float16>(a));
}
inline u16 narrow_bf16(f32 a) {
  const u32 bits = std::bit_cast<u32>(a);
  return std::isnan(a) ? kHalfNaN : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Warps.

struct Shuffled {
  u32 value;
  bool inside;  // whether the source lane is one
};
enum class Shuffle { Up, Down, Bfly, Idx };
template <Shuffle kind>
Shuffled shfl(u32 a, u32 b, u32 c, u32 mask, Site site = here()) {
  constexpr const char* kNames[] = {"__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                    "__shfl_sync"};
  const u32 own = lane(), segment = c >> 8 & 31;
  const u32 first = own & segment, last = first | (c & 31 & ~segment);
  b &= 31;
  u32 source = 0;
  bool inside = false;
  if constexpr (kind == Shuffle::Up) {
    source = own - b;
    inside = static_cast<s32>(source) >= static_cast<s32>(last);
  } else {
    source = kind == Shuffle::Down   ? own + b
             : kind == Shuffle::Bfly ? own ^ b
                                     : first | (b & ~segment);
    inside = source <= last;
  }
  const u64 value = shuffle(kNames[static_cast<int>(kind)], mask, a,
                            inside ? static_cast<int>(source) : kOwn, site);
  return {static_cast<u32>(value), inside};
}

}  // namespace cuda_emulator::ptx
