// Exact selection in about one pass. A sample gives an interval of keys that should hold the k-th;
// one sweep over the inputs computes every score in registers, writes the mask of what lies above
// the interval and collects the few keys inside it; the counts prove that the k-th is among them,
// and the winners among the collected are set in the mask. Bound by reading the inputs once. If the
// interval missed, or holds more than there is room for, histograms narrow it and the sweep is made
// again; one key that too many elements share is cut in index order by a partial sweep. Compiled
// once per instruction set; no torch header, no static data (see cmake/op.cmake).
#include <algorithm>
#include <cstring>
#include <limits>

#include "common/evaluate.h"
#include "topk/topk.h"

namespace secateur::topk::SECATEUR_ISA {
namespace {

// Neighbours sampled together: a cache line of float. More would be cheap, but neighbours in a row
// of a real gradient are much alike, and the more of them, the less the sample knows.
constexpr int kSampleRun = 16;

constexpr int64_t kMaxSample = int64_t{1} << 18;
constexpr int64_t kMinCapacity = 49152;
constexpr int64_t kElementsPerCapacity = 160;  // room for one in 160: 1 % of the scores' size

template <typename K>
constexpr K kLowest = std::numeric_limits<K>::min();
template <typename K>
constexpr K kHighest = std::numeric_limits<K>::max();

// What makes keys of scores of type T, and looks into an interval of them.
template <typename T>
struct KeyRule {
  using K = Int<T>;
  K flip;       // all ones where smaller scores are better
  K limit;      // |score| above this, as bits, is an error
  K low, high;  // of the interval's orders, both included

  explicit KeyRule(const Search& s)
      : flip(s.largest ? 0 : -1),
        limit(bits_as<K>(std::numeric_limits<T>::infinity()) - (s.finite ? 1 : 0)),
        low(static_cast<K>(s.largest ? s.low : ~s.high)),
        high(static_cast<K>(s.largest ? s.high : ~s.low)) {
    // -0.0 comes right before 0.0, but no key lies between them.
    if (low == 0) low = -1;
    if (high == -1) high = -2;
  }

  // The score's place among all bit patterns, smallest first.
  template <typename V>
  static Int<V> order(V score) {
    const Int<V> bits = bits_as<Int<V>>(score);
    const Int<V> negative = bits >> (sizeof(K) * 8 - 1);  // all ones
    return bits ^ (negative & kHighest<K>);
  }

  // Larger is better; -0.0 and 0.0 have the same key.
  template <typename V>
  Int<V> key(V score) const {
    const Int<V> place = order(score);
    return (place == Int<V>{} - 1 ? Int<V>{} : place) ^ flip;
  }

  // An error if it is above the limit.
  template <typename V>
  static Int<V> magnitude(V score) {
    return bits_as<Int<V>>(absolute(score));
  }
};

// What of 64 neighbouring elements lies where, one bit each.
struct Classes {
  uint64_t above, inside;
  bool bad;  // some score is an error
};

template <typename T>
inline Classes classify(const T* scores, const KeyRule<T>& rule) {
  constexpr int lanes = kLanes<T>;
  using V = Vec<T, lanes>;
  using I = Int<V>;
  uint64_t larger = 0, smaller = 0;
  I largest{};
  unroll<64 / lanes>([&](auto step) __attribute__((always_inline)) {
    constexpr int i = step * lanes;
    V x;
    std::memcpy(&x, scores + i, sizeof(x));
    const I order = rule.order(x);
    larger |= uint64_t{bits_greater<lanes, Int<T>>(order, I{} + rule.high)} << i;
    smaller |= uint64_t{bits_greater<lanes, Int<T>>(I{} + rule.low, order)} << i;
    const I magnitude = rule.magnitude(x);
    largest = magnitude > largest ? magnitude : largest;
  });
  return {rule.flip ? smaller : larger, ~(larger | smaller),
          bits_greater<lanes, Int<T>>(largest, I{} + rule.limit) != 0};
}

// The bytes of n bits, at most 64; to copy a size that the compiler knows is no call.
inline void copy_word(void* to, const void* from, int64_t n) {
  if (n >= 64)
    std::memcpy(to, from, 8);
  else
    std::memcpy(to, from, static_cast<size_t>((n + 7) / 8));
}

// Bits of elements index..index + n, at most 64, of a bit-packed mask; index is a multiple of 8.
inline uint64_t mask_word(const uint8_t* mask, int64_t index, int64_t n) {
  const uint64_t exist = n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
  if (!mask) return exist;
  uint64_t bits = 0;
  copy_word(&bits, mask + index / 8, n);
  return bits & exist;
}

template <typename F>
inline void for_bits(uint64_t bits, F&& f) {
  for (; bits; bits &= bits - 1) f(__builtin_ctzll(bits));
}

// Calls f(item, item's number, chunk, first element in the item, number of elements).
template <typename F>
inline void for_chunks(const Search& s, int64_t begin, int64_t end, F&& f) {
  int64_t i =
      std::upper_bound(s.items, s.items + s.n_items, begin,
                       [](int64_t chunk, const Item& item) { return chunk < item.first_chunk; }) -
      s.items - 1;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    while (i + 1 < s.n_items && chunk >= s.items[i + 1].first_chunk) ++i;
    const int64_t first = (chunk - s.items[i].first_chunk) * kChunk;
    f(s.items[i], i, chunk, first, std::min(kChunk, s.items[i].numel - first));
  }
}

template <typename T>
inline bool any_bad(const T* scores, const KeyRule<T>& rule, uint64_t alive) {
  bool bad = false;
  for_bits(alive, [&](int i) { bad |= rule.magnitude(scores[i]) > rule.limit; });
  return bad;
}

// Calls f(scores, classes of the living, element, how many are left) for every 64 elements of a
// chunk; 64 scores can be read.
template <typename T, typename F>
inline void for_words(const Search& s, const Item& item, const KeyRule<T>& rule, int64_t first,
                      int64_t n, F&& f) {
  Scorer<T> scorer(item.inputs, s.mode);
  scorer.for_words(first, n, [&](const T* scores, int64_t index, int64_t left) {
    Classes c = classify(scores, rule);
    if (item.alive || left < 64) {
      const uint64_t alive = mask_word(item.alive, index, left);
      c.above &= alive;
      c.inside &= alive;
      c.bad = c.bad && any_bad(scores, rule, alive);
    }
    f(scores, c, index - first, left);
  });
}

inline void store_mask(const Item& item, int64_t index, int64_t left, uint64_t bits) {
  copy_word(item.mask + index / 8, &bits, left);
}

inline void set_bit(const Item& item, int64_t index, int bit) {
  item.mask[index / 8] |= static_cast<uint8_t>(bit << index % 8);
}

inline void add_atomically(int64_t& counter, int64_t n) {
  if (n) __atomic_fetch_add(&counter, n, __ATOMIC_RELAXED);
}

inline void lower_atomically(int64_t& value, int64_t x) {
  int64_t old = __atomic_load_n(&value, __ATOMIC_RELAXED);
  while (x < old &&
         !__atomic_compare_exchange_n(&value, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Which of kBins equal parts of low..high a key falls into.
inline int shift_for(int64_t low, int64_t high) {
  const uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
  const int bits = range ? 64 - __builtin_clzll(range) : 0;
  return std::max(0, bits - 11);
}
static_assert(kBins == 1 << 11);

inline int64_t bin_of(int64_t key, int64_t low, int shift) {
  return static_cast<int64_t>((static_cast<uint64_t>(key) - static_cast<uint64_t>(low)) >> shift);
}

// The bin with the `rank`-th best key, counted from 1; narrows low..high to it, and leaves in
// `rank` the rank inside it. Returns how many keys it holds.
inline int64_t narrow(const int64_t* histogram, int shift, int64_t& low, int64_t& high,
                      int64_t& rank) {
  int64_t bin = kBins - 1;
  for (; bin > 0 && rank > histogram[bin]; --bin) rank -= histogram[bin];
  const uint64_t first = static_cast<uint64_t>(low) + (static_cast<uint64_t>(bin) << shift);
  const uint64_t width = std::min((uint64_t{1} << shift) - 1, static_cast<uint64_t>(high) - first);
  low = static_cast<int64_t>(first);
  high = static_cast<int64_t>(first + width);
  return histogram[bin];
}

// How many of the keys are at least `bound`.
template <typename K>
int64_t count_from(const K* keys, int64_t n, K bound) {
  constexpr int lanes = kLanes<K>;
  using V = Vec<K, lanes>;
  V counts{};  // minus the count: true is -1; n is far below the range of K
  int64_t i = 0, count = 0;
  for (; i + lanes <= n; i += lanes) {
    V x;
    std::memcpy(&x, keys + i, sizeof(x));
    counts += x >= V{} + bound;
  }
  for (int j = 0; j < lanes; ++j) count -= counts[j];
  for (; i < n; ++i) count += keys[i] >= bound;
  return count;
}

// The `rank`-th best of the keys, counted from 1, or one that is at most `slack` ranks worse; it is
// known to lie in low..high. By bisection: counting is a few vector instructions over a buffer that
// is in cache.
template <typename K>
K kth(const K* keys, int64_t n, int64_t low, int64_t high, int64_t rank, int64_t slack = 0) {
  while (low < high) {
    const int64_t middle =
        high - static_cast<int64_t>((static_cast<uint64_t>(high) - static_cast<uint64_t>(low)) / 2);
    const int64_t count = count_from(keys, n, static_cast<K>(middle));
    if (count < rank) {
      high = middle - 1;
    } else {
      low = middle;
      if (slack > 0 && count <= rank + slack) break;
    }
  }
  return static_cast<K>(low);
}

// Keys of one run of neighbours in each of n_tasks equal parts of the elements.
template <typename T>
void run_sample(Search& s, int64_t begin, int64_t end) {
  using K = Int<T>;
  struct Place {
    const Item* item;
    int64_t first, n;
  };
  constexpr int ahead = 16;  // places that memory is asked for before the first is read
  const KeyRule<T> rule(s);
  const int64_t part = s.numel / s.n_tasks;
  const Item* item = s.items;
  const Item* const last = s.items + s.n_items - 1;
  RunBuffers<T> buffers;
  Place places[ahead];
  K keys[ahead * kSampleRun];
  int64_t sampled = 0;
  for (int64_t task = begin; task < end + ahead; ++task) {
    Place& place = places[task % ahead];
    if (task >= begin + ahead) {
      T scores[kSampleRun];
      const ScoreInputs& in = place.item->inputs;
      if (s.mode == Mode::State)
        evaluate<Mode::State>(in, place.first, place.n, buffers, scores);
      else
        evaluate<Mode::Observe>(in, place.first, place.n, buffers, scores);
      uint64_t alive = mask_word(place.item->alive, place.first, place.n);
      if (alive == (uint64_t{1} << kSampleRun) - 1) {
        for (int j = 0; j < kSampleRun; ++j) keys[sampled + j] = rule.key(scores[j]);
        sampled += kSampleRun;
      } else {
        for_bits(alive, [&](int j) { keys[sampled++] = rule.key(scores[j]); });
      }
      if (sampled > (ahead - 1) * kSampleRun || task + 1 == end + ahead) {
        const int64_t at = __atomic_fetch_add(&s.pooled, sampled, __ATOMIC_RELAXED);
        std::copy_n(keys, sampled, static_cast<K*>(s.keys) + at);
        sampled = 0;
      }
    }
    if (task >= end) continue;
    // Anywhere in the part: a fixed stride could follow a row's length.
    const int64_t element =
        task * part + mix(static_cast<uint32_t>(task)) % static_cast<uint64_t>(part);
    while (item < last && element >= item[1].first_element) ++item;
    const int64_t first = (element - item->first_element) / kSampleRun * kSampleRun;
    place = {item, first, std::min<int64_t>(kSampleRun, item->numel - first)};
    prefetch(item->inputs, first, place.n);
  }
}

template <typename T>
void run_sweep(Search& s, int64_t begin, int64_t end) {
  using K = Int<T>;
  const KeyRule<T> rule(s);
  alignas(64) K keys[kChunk + 1];
  uint16_t offsets[kChunk + 1];
  const bool collect = s.low < s.high;
  int64_t total_above = 0, total_inside = 0, bad_item = s.n_items;
  for_chunks(s, begin, end,
             [&](const Item& item, int64_t i, int64_t chunk, int64_t first, int64_t n) {
               int64_t inside = 0, collected = 0;
               bool bad = false;
               for_words<T>(s, item, rule, first, n,
                            [&](const T* scores, const Classes& c, int64_t at, int64_t left) {
                              store_mask(item, first + at, left, c.above);
                              bad |= c.bad;
                              total_above += __builtin_popcountll(c.above);
                              inside += __builtin_popcountll(c.inside);
                              if (!collect) return;
                              // Most words hold no candidate or one: written in any case, so
                              // that there is no branch to mispredict, and counted if it is there.
                              uint64_t left_inside = c.inside;
                              do {
                                const int j = __builtin_ctzll(left_inside | uint64_t{1} << 63);
                                keys[collected] = rule.key(scores[j]);
                                offsets[collected] = static_cast<uint16_t>(at + j);
                                collected += left_inside != 0;
                                left_inside &= left_inside - 1;
                              } while (left_inside);
                            });
               if (bad) bad_item = std::min(bad_item, i);
               total_inside += inside;
               s.candidates[chunk] = {0, inside};
               if (collected == 0) return;
               const int64_t at = __atomic_fetch_add(&s.pooled, collected, __ATOMIC_RELAXED);
               s.candidates[chunk].begin = at;
               if (at + collected > s.capacity) return;
               std::copy_n(keys, collected, static_cast<K*>(s.keys) + at);
               std::copy_n(offsets, collected, s.offsets + at);
             });
  add_atomically(s.above, total_above);
  add_atomically(s.inside, total_inside);
  lower_atomically(s.bad_item, bad_item);
}

// Keeps the candidates above the k-th's key, low = high, and leaves only its ties as candidates.
template <typename T>
void run_choose(Search& s, int64_t begin, int64_t end) {
  using K = Int<T>;
  const K* const keys = static_cast<const K*>(s.keys);
  const K threshold = static_cast<K>(s.low);
  int64_t total_above = 0;
  for_chunks(s, begin, end, [&](const Item& item, int64_t, int64_t chunk, int64_t first, int64_t) {
    Candidates& c = s.candidates[chunk];
    const int64_t last = c.begin + c.count;
    c.count = 0;
    for (int64_t i = c.begin; i < last; ++i) {
      // No branch: nothing predicts which way a candidate falls.
      const int above = keys[i] > threshold;
      set_bit(item, first + s.offsets[i], above);
      total_above += above;
      s.offsets[c.begin + c.count] = s.offsets[i];
      c.count += keys[i] == threshold;
    }
  });
  add_atomically(s.above, total_above);
}

template <typename T>
void run_histogram(Search& s, int64_t begin, int64_t end) {
  const KeyRule<T> rule(s);
  int64_t histogram[kBins] = {};
  int64_t bad_item = s.n_items;
  for_chunks(s, begin, end, [&](const Item& item, int64_t i, int64_t, int64_t first, int64_t n) {
    int64_t above = 0, inside = 0;
    bool bad = false;
    for_words<T>(s, item, rule, first, n, [&](const T* scores, const Classes& c, int64_t, int64_t) {
      bad |= c.bad;
      above += __builtin_popcountll(c.above);
      inside += __builtin_popcountll(c.inside);
      for_bits(c.inside, [&](int j) { ++histogram[bin_of(rule.key(scores[j]), s.low, s.shift)]; });
    });
    if (bad) bad_item = std::min(bad_item, i);
    if (!item.counts) return;
    add_atomically(item.counts[0], above);
    add_atomically(item.counts[1], inside);
  });
  for (int bin = 0; bin < kBins; ++bin) add_atomically(s.histogram[bin], histogram[bin]);
  lower_atomically(s.bad_item, bad_item);
}

// Keeps the ties, elements of key low = high, in all the chunks but the last, and there the first
// s.ties of them.
template <typename T>
void run_fill(Search& s, int64_t begin, int64_t end) {
  const KeyRule<T> rule(s);
  for_chunks(s, begin, end,
             [&](const Item& item, int64_t, int64_t chunk, int64_t first, int64_t n) {
               int64_t ties = chunk + 1 < s.n_tasks ? n : s.ties;
               for_words<T>(s, item, rule, first, n,
                            [&](const T*, const Classes& c, int64_t at, int64_t left) {
                              uint64_t kept = c.inside;
                              while (__builtin_popcountll(kept) > ties)
                                kept &= ~(uint64_t{1} << (63 - __builtin_clzll(kept)));
                              ties -= __builtin_popcountll(kept);
                              store_mask(item, first + at, left, c.above | kept);
                            });
             });
}

template <typename T>
void run_typed(Search& s, int64_t begin, int64_t end) {
  switch (s.step) {
    case Step::Sample:
      return run_sample<T>(s, begin, end);
    case Step::Sweep:
      return run_sweep<T>(s, begin, end);
    case Step::Histogram:
      return run_histogram<T>(s, begin, end);
    case Step::Choose:
      return run_choose<T>(s, begin, end);
    case Step::Fill:
      return run_fill<T>(s, begin, end);
    case Step::Done:
      return;
  }
}

void go_sweep(Search& s, int64_t low, int64_t high) {
  s.step = Step::Sweep;
  s.n_tasks = s.n_chunks;
  s.low = low;
  s.high = high;
  s.above = s.inside = s.pooled = 0;
}

void go_histogram(Search& s, int64_t low, int64_t high) {
  s.step = Step::Histogram;
  s.n_tasks = s.n_chunks;
  s.low = low;
  s.high = high;
  s.shift = shift_for(low, high);
  std::fill_n(s.histogram, kBins, 0);
}

// `inside` elements are known to lie in low..high, among them the k-th.
void look_into(Search& s, int64_t low, int64_t high, int64_t inside) {
  if (inside <= s.capacity || low == high) return go_sweep(s, low, high);
  go_histogram(s, low, high);
}

template <typename T>
void after_sample(Search& s) {
  using K = Int<T>;
  const K* const keys = static_cast<const K*>(s.keys);
  int64_t low = kLowest<K>, high = kHighest<K>;
  if (s.pooled > 0) {
    const double n = static_cast<double>(s.pooled);
    const double alive = static_cast<double>(s.alive);
    const double share = static_cast<double>(s.keep) / alive;
    const double room = static_cast<double>(s.capacity) * n / alive;  // for sampled keys
    const int64_t rank = std::max<int64_t>(1, static_cast<int64_t>(n * share));
    // Four standard deviations of the sample's k-th on each side, if there is room for what lies
    // between; many may share a key, so that is known only afterwards. Then fewer, and at last the
    // k-th's own key, which needs no room.
    const double wanted = 4 * __builtin_sqrt(n * share * (1 - share));
    const int64_t widest = static_cast<int64_t>(std::min(wanted, 0.45 * room)) + 1;
    for (int64_t margin = widest;; margin = margin > widest / 4 ? margin / 2 : 0) {
      const int64_t slack = margin / 16;
      low = kLowest<K>, high = kHighest<K>;
      if (rank + margin <= s.pooled) low = kth(keys, s.pooled, low, high, rank + margin, slack);
      if (rank - margin >= 1) high = kth(keys, s.pooled, low, high, rank - margin, slack);
      if (low == high) break;
      int64_t inside = count_from(keys, s.pooled, static_cast<K>(low));
      if (high < kHighest<K>) inside -= count_from(keys, s.pooled, static_cast<K>(high + 1));
      if (margin == 0 || static_cast<double>(inside) <= 0.97 * room) break;
    }
  }
  go_sweep(s, low, high);
}

// The k-th is among the collected candidates: s.low = s.high = its key.
template <typename T>
void go_choose(Search& s) {
  using K = Int<T>;
  s.step = Step::Choose;
  s.n_tasks = s.n_chunks;
  s.low = s.high = kth(static_cast<const K*>(s.keys), s.pooled, s.low, s.high, s.keep - s.above);
}

// Keeps the first of the ties that run_choose() left, as many as are still to be kept.
void after_choose(Search& s) {
  s.step = Step::Done;
  int64_t ties = s.keep - s.above;
  for_chunks(s, 0, s.n_chunks,
             [&](const Item& item, int64_t, int64_t chunk, int64_t first, int64_t) {
               const Candidates c = s.candidates[chunk];
               for (int64_t i = c.begin; i < c.begin + c.count && ties > 0; ++i, --ties)
                 set_bit(item, first + s.offsets[i], 1);
             });
}

template <typename T>
void after_sweep(Search& s) {
  using K = Int<T>;
  s.step = Step::Done;
  if (s.bad_item < s.n_items || s.by_threshold || s.above == s.keep) return;
  if (s.above > s.keep) {  // the k-th lies higher
    s.base = 0;
    return look_into(s, s.high + 1, kHighest<K>, s.above);
  }
  if (s.above + s.inside < s.keep) {  // it lies lower
    s.base = s.above + s.inside;
    return look_into(s, kLowest<K>, s.low - 1, s.alive - s.base);
  }
  if (s.low == s.high) {
    int64_t chunk = 0;
    for (s.ties = s.keep - s.above; s.ties > s.candidates[chunk].count; ++chunk)
      s.ties -= s.candidates[chunk].count;
    s.step = Step::Fill;
    s.n_tasks = chunk + 1;
    return;
  }
  if (s.inside <= s.capacity) return go_choose<T>(s);
  s.base = s.above;
  look_into(s, s.low, s.high, s.inside);
}

void after_histogram(Search& s) {
  int64_t low = s.low, high = s.high, rank = s.keep - s.base;
  const int64_t inside = narrow(s.histogram, s.shift, low, high, rank);
  s.base = s.keep - rank;
  look_into(s, low, high, inside);
}

template <typename T>
void start_typed(Search& s) {
  using K = Int<T>;
  if (s.by_threshold) {
    // The keys to keep are those above the one before the threshold's.
    const int64_t before = int64_t{KeyRule<T>(s).key(static_cast<T>(s.threshold))} - 1;
    return go_sweep(s, before, before);
  }
  // Nothing, or everything, lies above an end of the range; the sweep only looks for bad scores.
  if (s.keep == 0) return go_sweep(s, kHighest<K>, kHighest<K>);
  if (s.keep == s.alive) return go_sweep(s, kLowest<K>, kLowest<K>);
  if (s.alive <= s.capacity) return go_sweep(s, kLowest<K>, kHighest<K>);
  s.step = Step::Sample;
  s.n_tasks = std::min(s.capacity, kMaxSample) / kSampleRun;
  s.pooled = 0;
}

template <typename T>
void advance_typed(Search& s) {
  switch (s.step) {
    case Step::Sample:
      return after_sample<T>(s);
    case Step::Sweep:
      return after_sweep<T>(s);
    case Step::Histogram:
      return after_histogram(s);
    case Step::Choose:
      return after_choose(s);
    case Step::Fill:
    case Step::Done:
      s.step = Step::Done;
  }
}

template <typename T>
void start_histogram_typed(Search& s) {
  using K = Int<T>;
  const int64_t lowest = kLowest<K>, highest = kHighest<K>;
  go_histogram(s, std::clamp(s.low, lowest, highest), std::clamp(s.high, lowest, highest));
}

void count_alive(Search& s) {
  s.alive = 0;
  for (int64_t i = 0; i < s.n_items; ++i) {
    const Item& item = s.items[i];
    if (!item.alive) {
      s.alive += item.numel;
      continue;
    }
    for (int64_t at = 0; at < item.numel; at += 64)
      s.alive += __builtin_popcountll(mask_word(item.alive, at, item.numel - at));
  }
}

}  // namespace

int64_t capacity(int64_t numel) { return kMinCapacity + numel / kElementsPerCapacity; }

void start(Search& s) {
  s.step = Step::Done;
  s.bad_item = s.n_items;
  count_alive(s);
  if (s.n_chunks == 0 || (!s.by_threshold && s.keep > s.alive)) return;
  s.wide ? start_typed<double>(s) : start_typed<float>(s);
}

void start_histogram(Search& s) {
  s.bad_item = s.n_items;
  count_alive(s);
  s.wide ? start_histogram_typed<double>(s) : start_histogram_typed<float>(s);
}

void advance(Search& s) { s.wide ? advance_typed<double>(s) : advance_typed<float>(s); }

void run(Search& s, int64_t begin, int64_t end) {
  s.wide ? run_typed<double>(s, begin, end) : run_typed<float>(s, begin, end);
}

}  // namespace secateur::topk::SECATEUR_ISA
