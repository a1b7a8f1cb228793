// N:M masks: the n best of every m neighbours. Scores are made in L1, 64 at a time, and never leave
// it; an element is kept if fewer than n of its group are better, which is counted by comparing a
// vector with itself, lanes exchanged: m - 1 comparisons a vector, no branch, ties by index. Up
// to m = 8 that takes about as long as reading the inputs once; above, the comparisons bound it.
// Groups of a power of two that fill the rows lie as the vectors want them. All others are copied
// to slots of the next power of two; what pads them is worse than any score.
// Compiled once per instruction set; no torch header, no static data (see cmake/op.cmake).
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "common/evaluate.h"
#include "nm/nm.h"

namespace secateur::nm::SECATEUR_ISA {
namespace {

// Worse than the key of any finite score.
template <typename T>
constexpr Int<T> kWorst = std::numeric_limits<Int<T>>::min();

// The keys of 64 elements: integers of which the larger is better.
template <typename T>
using Keys = Vec<Int<T>, kLanes<T>>[64 / kLanes<T>];

// Turns scores into keys; 0.0 and -0.0 have the same.
template <typename T>
struct KeyRule {
  using I = Int<Vec<T, kLanes<T>>>;
  Int<T> flip;
  I highest{};  // magnitude yet, as bits

  explicit KeyRule(bool largest) : flip(largest ? 0 : -1) {}

  __attribute__((always_inline)) void operator()(const T* scores, Keys<T>& keys) {
    constexpr Int<T> limit = std::numeric_limits<Int<T>>::max();
    constexpr int lanes = kLanes<T>;
    unroll<64 / lanes>([&](auto v) __attribute__((always_inline)) {
      Vec<T, lanes> x;
      std::memcpy(&x, scores + v * lanes, sizeof(x));
      const I bits = bits_as<I>(x + Vec<T, lanes>{});
      const I magnitude = bits & limit;
      highest = magnitude > highest ? magnitude : highest;
      keys[v] = bits ^ ((bits >> (sizeof(T) * 8 - 1)) & limit) ^ flip;
    });
  }

  // Whether some score was not finite.
  bool bad() const {
    const Int<T> infinity = bits_as<Int<T>>(std::numeric_limits<T>::infinity());
    return bits_greater<kLanes<T>, Int<T>>(highest, I{} + (infinity - 1)) != 0;
  }
};

// Lane l is v[l ^ D].
template <int D, typename V>
inline V exchange(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  return [&]<int... L>(std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(v, v, (L ^ D)...);
  }(std::make_integer_sequence<int, n>{});
}

// -1 in the lanes l with l ^ D < l.
template <int D, typename I>
constexpr I lower_partner() {
  constexpr int n = sizeof(I) / sizeof(I{}[0]);
  return [&]<int... L>(std::integer_sequence<int, L...>) {
    return I{((L ^ D) < L ? -1 : 0)...};
  }(std::make_integer_sequence<int, n>{});
}

// counts[l] - 1 where a[l] > b[l].
template <int N, typename K>
inline Vec<K, N> count_greater(Vec<K, N> counts, Vec<K, N> a, Vec<K, N> b) {
#if defined(__AVX512F__)
  // gcc 12 makes a vector of the comparison's bits first.
  const auto x = reinterpret_cast<__m512i>(counts), minus_one = _mm512_set1_epi64(-1);
  if constexpr (sizeof(K) == 4)
    return reinterpret_cast<Vec<K, N>>(
        _mm512_mask_add_epi32(x, static_cast<__mmask16>(bits_greater<N, K>(a, b)), x, minus_one));
  else
    return reinterpret_cast<Vec<K, N>>(
        _mm512_mask_add_epi64(x, static_cast<__mmask8>(bits_greater<N, K>(a, b)), x, minus_one));
#else
  return counts + (a > b);
#endif
}

// Which of 64 keys are among the n best of their group of P; ties go to the lower index.
template <int P, typename T>
__attribute__((always_inline)) inline uint64_t best(const Keys<T>& keys, int64_t n) {
  constexpr int lanes = kLanes<T>;
  constexpr int span = std::min(P, lanes);
  using K = Int<T>;
  using I = Vec<K, lanes>;
  const I enough = I{} - static_cast<K>(n);
  uint64_t kept = 0;
  for (int at = 0; at < 64 / lanes; ++at) {
    const I key = keys[at];
    // A partner of lower index is better where it is equal too: above key - 1. As unsigned, since
    // the worst wraps around; that gives a slot's padding wrong ranks, and nobody asks for them.
    const auto less = [&](I by) {
      return bits_as<I>(bits_as<Word<I>>(key) + bits_as<Word<I>>(by));
    };
    I better{};  // minus how many
    unroll<span>([&](auto d) __attribute__((always_inline)) {
      if constexpr (d > 0)
        better = count_greater<lanes, K>(better, exchange<d>(key), less(lower_partner<d, I>()));
    });
    if constexpr (P > lanes) {
      constexpr int vectors = P / lanes;  // of a group
      for (int j = at / vectors * vectors; j < (at / vectors + 1) * vectors; ++j) {
        if (j == at) continue;
        const I other = keys[j];
        const I bound = j < at ? less(I{} - 1) : key;
        unroll<lanes>([&](auto d) __attribute__((always_inline)) {
          better = count_greater<lanes, K>(better, exchange<d>(other), bound);
        });
      }
    }
    kept |= uint64_t{bits_greater<lanes, K>(better, enough)} << at * lanes;
  }
  return kept;
}

inline uint64_t lowest_bits(int64_t n) { return n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0}; }

// Elements first..last where groups are aligned to their size.
template <int P, typename T>
void run_aligned(const Args& a, int64_t first, int64_t last, Scorer<T>& scorer,
                 KeyRule<T>& key_of) {
  scorer.for_words(first, last - first, [&](const T* scores, int64_t at, int64_t left) {
    Keys<T> keys;
    key_of(scores, keys);
    uint64_t kept = best<P, T>(keys, a.n);
    if (left >= 64) {
      std::memcpy(a.mask + at / 8, &kept, sizeof(kept));
    } else {
      kept &= lowest_bits(left);
      std::memcpy(a.mask + at / 8, &kept, static_cast<size_t>((left + 7) / 8));
    }
  });
}

// Elements first..last of any groups. A group that sticks out at an end is judged as a whole, here
// and in the neighbouring unit; each writes its own part.
template <int P, typename T>
void run_padded(const Args& a, int64_t first, int64_t last, Scorer<T>& scorer, KeyRule<T>& key_of) {
  constexpr int slots = 64 / P;
  alignas(64) Int<T> keys[kRun];
  uint64_t bits[kUnit / 64 + 2] = {};  // from element `origin` on
  const int64_t origin = first - 64;
  int64_t col = first % a.n_cols / a.m * a.m;
  int64_t index = first - first % a.n_cols + col;
  while (index < last) {
    // Whole groups, up to the end of the one that holds element `inside`.
    const int64_t inside = std::min(index + kRun - kMaxGroup, last) - 1;
    const int64_t inside_col = inside % a.n_cols;
    const int64_t end = inside - inside_col + std::min((inside_col / a.m + 1) * a.m, a.n_cols);
    scorer.for_words(index, end - index, [&](const T* scores, int64_t at, int64_t) {
      Keys<T> made;
      key_of(scores, made);
      std::memcpy(keys + (at - index), &made, sizeof(made));
    });
    for (int64_t at = index; at < end;) {
      Int<T> padded[64];
      int64_t size[slots] = {}, to = at - origin;
      int used = 0;
      for (; used < slots && at < end; ++used) {
        size[used] = std::min(a.m, a.n_cols - col);
        for (int i = 0; i < P; ++i)
          padded[used * P + i] = i < size[used] ? keys[at - index + i] : kWorst<T>;
        at += size[used];
        col = col + size[used] == a.n_cols ? 0 : col + size[used];
      }
      std::fill(padded + used * P, padded + 64, kWorst<T>);
      Keys<T> together;
      std::memcpy(&together, padded, sizeof(padded));
      const uint64_t kept = best<P, T>(together, a.n);
      for (int s = 0; s < slots; to += size[s++]) {
        const uint64_t group = kept >> s * P & lowest_bits(size[s]);
        bits[to / 64] |= group << to % 64;
        if (to % 64 + size[s] > 64) bits[to / 64 + 1] |= group >> (64 - to % 64);
      }
    }
    index = end;
  }
  std::memcpy(a.mask + first / 8, bits + 1, static_cast<size_t>((last - first + 7) / 8));
}

template <int P, typename T>
bool run_units(const Args& a, int64_t begin, int64_t end) {
  Scorer<T> scorer(a.inputs, a.mode);
  KeyRule<T> key_of(a.largest);
  const bool aligned = a.m == P && a.n_cols % P == 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kUnit, last = std::min(first + kUnit, a.numel);
    if (aligned)
      run_aligned<P>(a, first, last, scorer, key_of);
    else
      run_padded<P>(a, first, last, scorer, key_of);
  }
  return key_of.bad();
}

template <typename T>
bool run_typed(const Args& a, int64_t begin, int64_t end) {
  switch (std::bit_ceil(static_cast<uint64_t>(a.m))) {
    case 1:
      return run_units<1, T>(a, begin, end);
    case 2:
      return run_units<2, T>(a, begin, end);
    case 4:
      return run_units<4, T>(a, begin, end);
    case 8:
      return run_units<8, T>(a, begin, end);
    case 16:
      return run_units<16, T>(a, begin, end);
    case 32:
      return run_units<32, T>(a, begin, end);
    default:
      return run_units<64, T>(a, begin, end);
  }
}

}  // namespace

bool run(const Args& args, int64_t begin, int64_t end) {
  return args.wide ? run_typed<double>(args, begin, end) : run_typed<float>(args, begin, end);
}

}  // namespace secateur::nm::SECATEUR_ISA
