// N:M masks: the n best of every m neighbours. The scores of a run are made in L1 and never leave
// it; an element is kept if fewer than n of its group are better, which is counted by comparing a
// vector with itself, lanes exchanged: m - 1 comparisons a vector, no branch, ties by index. Up
// to m = 4 that takes about as long as reading the inputs once; above, the comparisons bound it.
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

// Elements scored and judged at a time: few, so that reading and comparing overlap.
constexpr int kStep = 256;
static_assert(kStep <= kRun);

// Worse than the key of any finite score.
template <typename T>
constexpr Int<T> kWorst = std::numeric_limits<Int<T>>::min();

// Turns scores into keys, integers of which the larger is better; 0.0 and -0.0 have the same.
// Fills up to the next multiple of 64 with the worst. Returns whether some score is not finite.
template <typename T>
bool make_keys(const T* scores, int64_t n, bool largest, Int<T>* keys) {
  constexpr int lanes = kLanes<T>;
  using V = Vec<T, lanes>;
  using I = Int<V>;
  constexpr Int<T> limit = std::numeric_limits<Int<T>>::max();
  const Int<T> infinity = bits_as<Int<T>>(std::numeric_limits<T>::infinity());
  const Int<T> flip = largest ? 0 : -1;
  I highest{};
  for (int64_t i = 0; i < n; i += lanes) {
    const V x = load_first<lanes>(scores + i, n - i);
    const I bits = bits_as<I>(x + V{});
    const I key = bits ^ ((bits >> (sizeof(T) * 8 - 1)) & limit) ^ flip;
    std::memcpy(keys + i, &key, sizeof(key));
    const I magnitude = bits & limit;
    highest = magnitude > highest ? magnitude : highest;
  }
  std::fill(keys + n, keys + (n + 63) / 64 * 64, kWorst<T>);
  return bits_greater<lanes, Int<T>>(highest, I{} + (infinity - 1)) != 0;
}

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
inline uint64_t best(const Int<T>* keys, int64_t n) {
  constexpr int lanes = kLanes<T>;
  constexpr int span = std::min(P, lanes);
  using K = Int<T>;
  using I = Vec<K, lanes>;
  const I enough = I{} - static_cast<K>(n);
  uint64_t kept = 0;
  for (int i = 0; i < 64; i += lanes) {
    I key;
    std::memcpy(&key, keys + i, sizeof(key));
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
      const int group = i / P * P;
      for (int j = group; j < group + P; j += lanes) {
        if (j == i) continue;
        I other;
        std::memcpy(&other, keys + j, sizeof(other));
        const I bound = j < i ? less(I{} - 1) : key;
        unroll<lanes>([&](auto d) __attribute__((always_inline)) {
          better = count_greater<lanes, K>(better, exchange<d>(other), bound);
        });
      }
    }
    kept |= uint64_t{bits_greater<lanes, K>(better, enough)} << i;
  }
  return kept;
}

inline uint64_t lowest_bits(int64_t n) { return n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0}; }

// Scores elements index..index + n, n <= kRun, and leaves their keys.
template <typename T>
inline bool keys_of(const Args& a, int64_t index, int64_t n, RunBuffers<T>& buffers, Int<T>* keys) {
  alignas(64) T scores[kRun];
  prefetch_ahead(a.inputs, index, n);
  if (a.mode == Mode::State)
    evaluate<Mode::State>(a.inputs, index, n, buffers, scores);
  else
    evaluate<Mode::Observe>(a.inputs, index, n, buffers, scores);
  return make_keys(scores, n, a.largest, keys);
}

// Elements first..last where groups are aligned to their size.
template <int P, typename T>
bool run_aligned(const Args& a, int64_t first, int64_t last, RunBuffers<T>& buffers) {
  alignas(64) Int<T> keys[kStep];
  bool bad = false;
  for (int64_t index = first; index < last; index += kStep) {
    const int64_t count = std::min<int64_t>(kStep, last - index);
    bad |= keys_of(a, index, count, buffers, keys);
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      const uint64_t kept = best<P, T>(keys + i, a.n);
      std::memcpy(a.mask + (index + i) / 8, &kept, sizeof(kept));
    }
    if (i == count) continue;
    const uint64_t kept = best<P, T>(keys + i, a.n) & lowest_bits(count - i);
    std::memcpy(a.mask + (index + i) / 8, &kept, static_cast<size_t>((count - i + 7) / 8));
  }
  return bad;
}

// Elements first..last of any groups. A group that sticks out at an end is judged as a whole, here
// and in the neighbouring unit; each writes its own part.
template <int P, typename T>
bool run_padded(const Args& a, int64_t first, int64_t last, RunBuffers<T>& buffers) {
  constexpr int slots = 64 / P;
  alignas(64) Int<T> keys[kRun];
  uint64_t bits[kUnit / 64 + 2] = {};  // from element `origin` on
  const int64_t origin = first - 64;
  bool bad = false;
  int64_t col = first % a.n_cols / a.m * a.m;
  int64_t index = first - first % a.n_cols + col;
  while (index < last) {
    // Whole groups, up to the end of the one that holds element `inside`.
    const int64_t inside = std::min(index + kRun - kMaxGroup, last) - 1;
    const int64_t inside_col = inside % a.n_cols;
    const int64_t end = inside - inside_col + std::min((inside_col / a.m + 1) * a.m, a.n_cols);
    bad |= keys_of(a, index, end - index, buffers, keys);
    for (int64_t at = index; at < end;) {
      alignas(64) Int<T> padded[64];
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
      const uint64_t kept = best<P, T>(padded, a.n);
      for (int s = 0; s < slots; to += size[s++]) {
        const uint64_t group = kept >> s * P & lowest_bits(size[s]);
        bits[to / 64] |= group << to % 64;
        if (to % 64 + size[s] > 64) bits[to / 64 + 1] |= group >> (64 - to % 64);
      }
    }
    index = end;
  }
  std::memcpy(a.mask + first / 8, bits + 1, static_cast<size_t>((last - first + 7) / 8));
  return bad;
}

template <int P, typename T>
bool run_units(const Args& a, int64_t begin, int64_t end) {
  RunBuffers<T> buffers;
  bool bad = false;
  const bool aligned = a.m == P && a.n_cols % P == 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kUnit, last = std::min(first + kUnit, a.numel);
    bad |=
        aligned ? run_aligned<P>(a, first, last, buffers) : run_padded<P>(a, first, last, buffers);
  }
  return bad;
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
