// Bit-packed masks. Bound by reading and writing the tensor; the mask adds one bit an element.
// apply() looks at 64 elements' bits at once: where all are ones it does not touch the tensor, and
// where the dead are zero already, as after most updates, it reads and does not write.
// Compiled once per instruction set; no torch header, no static data (see cmake/op.cmake).
#include <algorithm>
#include <cstring>

#include "common/simd.h"
#include "mask/mask.h"

namespace secateur::mask::SECATEUR_ISA {
namespace {

// Eight bools, each 0 or 1, to the bits of one byte: the product moves byte i's low bit to bit
// 56 + i.
inline uint8_t gather_bits(uint64_t bools) {
  return static_cast<uint8_t>((bools & 0x0101010101010101u) * 0x0102040810204080u >> 56);
}

// The inverse: bit i of the byte, as 0 or 1, to byte i.
inline uint64_t spread_bits(uint8_t bits) {
  const uint64_t each = bits * 0x0101010101010101u & 0x8040201008040201u;
  return (each + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

// Calls f(byte, number of its bits) for bytes [begin, end) of a mask of numel bits. Eight is a
// constant there: a copy of as many bools is no call.
template <typename F>
inline void for_bytes(int64_t numel, int64_t begin, int64_t end, F&& f) {
  const int64_t whole = std::min(end, numel / 8);
  for (int64_t byte = begin; byte < whole; ++byte) f(byte, std::integral_constant<size_t, 8>{});
  if (whole < end) f(whole, static_cast<size_t>(numel % 8));
}

constexpr int kGroup = 64;

// One machine vector, with no more lanes than T has bits: of wider ones the compiler would compare
// lane by lane.
template <typename T>
constexpr int kStep = std::min<int>(kLanes<T>, 8 * sizeof(T));

// `v` where the bit in `alive` is set, zero elsewhere.
template <typename T>
inline Vec<T, kStep<T>> kept(Vec<T, kStep<T>> v, uint64_t alive) {
  using V = Vec<T, kStep<T>>;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    const auto x = reinterpret_cast<__m512i>(v);
    return reinterpret_cast<V>(sizeof(T) == 4 ? _mm512_maskz_mov_epi32(alive, x)
                                              : _mm512_maskz_mov_epi64(alive, x));
  }
#endif
  const V bit = []<int... I>(std::integer_sequence<int, I...>) {
    return V{static_cast<T>(T{1} << I)...};
  }(std::make_integer_sequence<int, kStep<T>>{});
  return v & reinterpret_cast<V>(((V{} + static_cast<T>(alive)) & bit) == bit);
}

template <typename V>
inline bool any(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    const auto x = reinterpret_cast<__m512i>(v);
    return _mm512_test_epi32_mask(x, x) != 0;
  }
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) {
    const auto x = reinterpret_cast<__m256i>(v);
    return _mm256_testz_si256(x, x) == 0;
  }
#endif
  uint64_t words[sizeof(V) / sizeof(uint64_t)], all = 0;
  std::memcpy(words, &v, sizeof(v));
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// Zeroes those of kGroup elements whose bit in `alive` is clear; whether one was not zero.
template <typename T>
inline bool apply_group(T* p, uint64_t alive) {
  using V = Vec<T, kStep<T>>;
  constexpr int n = kGroup / kStep<T>;
  V v[n], revived{};
  unroll<n>([&](auto i) {
    std::memcpy(&v[i], p + i * kStep<T>, sizeof(V));
    revived |= kept<T>(v[i], ~alive >> i * kStep<T>);
  });
  if (!any(revived)) return false;
  unroll<n>([&](auto i) {
    const V rest = kept<T>(v[i], alive >> i * kStep<T>);
    std::memcpy(p + i * kStep<T>, &rest, sizeof(V));
  });
  return true;
}

// A group is looked at as a whole where its elements lie side by side and its bits start a byte.
template <typename T>
bool apply_elements(const View& t, int64_t numel, const uint8_t* bits, int64_t begin, int64_t end) {
  T* const data = static_cast<T*>(t.data);
  const int64_t stride = t.stride[t.ndim - 1];
  const int64_t stop = std::min(end * 8, numel);
  bool revived = false;
  for (int64_t index = begin * 8; index < stop;) {
    const Position p = locate(t, index);
    T* const row = data + p.offset;
    const int64_t count = std::min(p.remaining, stop - index);
    for (int64_t i = 0; i < count;) {
      const int64_t at = index + i;
      if (stride == 1 && at % 8 == 0 && count - i >= kGroup) {
        uint64_t alive;
        std::memcpy(&alive, bits + at / 8, sizeof(alive));
        if (alive != ~uint64_t{0}) revived |= apply_group(row + i, alive);
        i += kGroup;
      } else {
        if (!(bits[at / 8] >> (at % 8) & 1)) {
          revived |= row[i * stride] != 0;
          row[i * stride] = T{0};
        }
        ++i;
      }
    }
    index += count;
  }
  return revived;
}

}  // namespace

void pack(const uint8_t* bools, int64_t numel, uint8_t* bits, int64_t begin, int64_t end) {
  for_bytes(numel, begin, end, [&](int64_t byte, auto count) {
    uint64_t eight = 0;
    std::memcpy(&eight, bools + byte * 8, count);
    bits[byte] = gather_bits(eight);
  });
}

void unpack(const uint8_t* bits, int64_t numel, uint8_t* bools, int64_t begin, int64_t end) {
  for_bytes(numel, begin, end, [&](int64_t byte, auto count) {
    const uint64_t eight = spread_bits(bits[byte]);
    std::memcpy(bools + byte * 8, &eight, count);
  });
}

bool apply(const View& tensor, int64_t numel, const uint8_t* bits, int64_t begin, int64_t end) {
  switch (tensor.dtype) {  // zero is all bits clear in every dtype, so the size is enough
    case Dtype::BFloat16:
    case Dtype::Half:
      return apply_elements<uint16_t>(tensor, numel, bits, begin, end);
    case Dtype::Float:
      return apply_elements<uint32_t>(tensor, numel, bits, begin, end);
    case Dtype::Double:
      return apply_elements<uint64_t>(tensor, numel, bits, begin, end);
  }
  return false;
}

}  // namespace secateur::mask::SECATEUR_ISA
