#pragma once
// Scores of a run of consecutive logical elements, for the CPU kernels: inputs are read where they
// lie if they are contiguous in the compute type, else widened and gathered through a small buffer
// in the first-level cache. Included by cpu.cpp files only.
#include <algorithm>

#include "common/score.h"
#include "common/simd.h"
#include "common/view.h"

namespace secateur {

namespace {

// Elements whose inputs are fetched, and whose formula is looked up, at a time: what is widened or
// gathered, and scores that are written down, stay in L1.
constexpr int kRun = 1024;
// Elements from what is evaluated to what memory is asked for meanwhile, where that helps.
constexpr int64_t kAhead = 1024;

// Calls f(element offset, stride, first, count) for each stretch of elements index..index + n of
// `t` along its last dimension; `first` counts from `index`.
template <typename F>
inline void for_stretches(const View& t, int64_t index, int64_t n, F&& f) {
  const int last = t.ndim - 1;
  for (int64_t first = 0; first < n;) {
    const Position p = locate(t, index + first);
    const int64_t count = p.remaining < n - first ? p.remaining : n - first;
    f(p.offset, t.stride[last], first, count);
    first += count;
  }
}

// Calls f.template operator()<V>(i) for vectors of T, and for what is left of n as single T.
template <typename T, typename F>
__attribute__((always_inline)) inline void for_lanes(int64_t n, F&& f) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f.template operator()<Vec<T, lanes>>(i);
  for (; i < n; ++i) f.template operator()<T>(i);
}

template <typename S>
inline void widen_run(const S* from, int64_t stride, int64_t n, Compute<S>* to) {
  int64_t i = 0;
  if (stride == 1) {
    constexpr int step = kLanes<Compute<S>>;
    for (; i + step <= n; i += step) store<step>(to + i, load<step>(from + i));
  }
  for (; i < n; ++i) to[i] = widen(from[i * stride]);
}

// Elements index..index + n of `t` in the compute type, in place or in `buffer`.
template <typename T>
inline const T* fetch(const View& t, int64_t index, int64_t n, T* buffer) {
  if (!t.data) return buffer;  // never read
  const bool contiguous = t.ndim == 1 && t.stride[0] == 1;
  const auto gather = [&]<typename S>() {
    const S* const data = static_cast<const S*>(t.data);
    for_stretches(t, index, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
      widen_run(data + offset, stride, count, buffer + first);
    });
    return static_cast<const T*>(buffer);
  };
  if constexpr (sizeof(T) == 8) {
    if (contiguous) return static_cast<const T*>(t.data) + index;
    return gather.template operator()<double>();
  } else {
    if (t.dtype == Dtype::BFloat16) return gather.template operator()<BFloat16>();
    if (t.dtype == Dtype::Half) return gather.template operator()<Half>();
    if (contiguous) return static_cast<const T*>(t.data) + index;
    return gather.template operator()<float>();
  }
}

// The inverse of fetch(): what it gathered to `buffer`.
template <typename T>
inline void put_back(const View& t, int64_t index, int64_t n, const T* from, const T* buffer) {
  if (from != buffer) return;
  T* const data = static_cast<T*>(t.data);
  for_stretches(t, index, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) data[offset + i * stride] = from[first + i];
  });
}

inline int64_t size_of(Dtype dtype) {
  return for_dtype(dtype, []<typename T>() { return static_cast<int64_t>(sizeof(T)); });
}

// Asks for elements index..index + n of `t`, where they are one stretch of memory. Inlined: a
// compiler takes a function that only prefetches for one without effect, and drops the call.
__attribute__((always_inline)) inline void prefetch(const View& t, int64_t index, int64_t n) {
  if (!t.data || t.ndim != 1 || t.stride[0] != 1) return;
  const char* const data = static_cast<const char*>(t.data);
  for (int64_t byte = index * size_of(t.dtype); byte < (index + n) * size_of(t.dtype); byte += 64)
    __builtin_prefetch(data + byte);
}

__attribute__((always_inline)) inline void prefetch(const ScoreInputs& in, int64_t index,
                                                    int64_t n) {
  prefetch(in.weight, index, n);
  prefetch(in.grad, index, n);
  prefetch(in.state, index, n);
}

// Whether the processor foresees no more than the rest of a page of 4 KiB, as Intel's do. Others
// only get in the way of their own foresight by what they are asked for.
inline bool foresees_one_page() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Asks for the inputs that lie `distance` elements after those of a pass, 64 elements at a time, so
// that requests and computation take turns. T is the compute type.
template <typename T>
class Ahead {
 public:
  explicit Ahead(const ScoreInputs& in, int64_t distance = kAhead)
      : on_(foresees_one_page()),
        weight_(in.weight, distance),
        grad_(in.grad, distance),
        state_(in.state, distance) {}

  template <Formula F, Mode M>
  __attribute__((always_inline)) void ask(int64_t index) const {
    if (!on_) return;
    if constexpr (needs_weight(F, M)) weight_.ask(index);
    if constexpr (needs_grad(F, M)) grad_.ask(index);
    if constexpr (M != Mode::Observe) state_.ask(index);
  }

 private:
  struct Stream {
    const char* data;
    int64_t size;  // of an element; zero where they do not lie side by side

    Stream(const View& t, int64_t distance)
        : data(static_cast<const char*>(t.data)),
          size(t.ndim == 1 && t.stride[0] == 1 ? size_of(t.dtype) : 0) {
      data += distance * size;
    }

    // As many lines as the compute type would have: the number is a constant.
    __attribute__((always_inline)) void ask(int64_t index) const {
      constexpr int lines = sizeof(T);
      unroll<lines>([&](auto i) __attribute__((always_inline)) {
        __builtin_prefetch(data + (index + i * (64 / lines)) * size);
      });
    }
  };
  bool on_;
  Stream weight_, grad_, state_;
};

// The inputs of neighbouring elements in the compute type; those that a formula does not need are
// never read.
template <typename T>
struct Inputs {
  const T *weight, *grad;
  T* state;
};

// The scores of as many elements as V has lanes, from the i-th of x on, which is element `index` of
// its tensor; Mode::Update writes the state.
template <Formula F, Mode M, typename V, typename T>
__attribute__((always_inline)) inline V score_at(const Inputs<T>& x, int64_t i,
                                                 const ScoreParams& params, int64_t index) {
  V a{}, b{}, c{};
  if constexpr (needs_weight(F, M)) __builtin_memcpy(&a, x.weight + i, sizeof(V));
  if constexpr (needs_grad(F, M)) __builtin_memcpy(&b, x.grad + i, sizeof(V));
  if constexpr (M != Mode::Observe) __builtin_memcpy(&c, x.state + i, sizeof(V));
  const V result = score<F, M>(a, b, c, params, index);
  if constexpr (M == Mode::Update) __builtin_memcpy(x.state + i, &c, sizeof(V));
  return result;
}

// Room for the inputs of a run.
template <typename T>
struct RunBuffers {
  alignas(64) T weight[kRun];
  alignas(64) T grad[kRun];
  alignas(64) T state[kRun];
};

// Elements index..index + n, n <= kRun, where they lie or in the buffers.
template <typename T>
inline Inputs<T> fetch(const ScoreInputs& in, int64_t index, int64_t n, RunBuffers<T>& buffers) {
  return {fetch(in.weight, index, n, buffers.weight), fetch(in.grad, index, n, buffers.grad),
          const_cast<T*>(fetch(in.state, index, n, buffers.state))};
}

// Scores of elements index..index + n, n <= kRun, to `out`; Mode::Update writes the state as well
// (and with kWrite false nothing else).
template <Mode M, bool kWrite = true, typename T>
inline void evaluate(const ScoreInputs& in, int64_t index, int64_t n, RunBuffers<T>& buffers,
                     T* out) {
  const Inputs<T> x = fetch(in, index, n, buffers);
  for_formula(in.formula, [&]<Formula F>() {
    for_lanes<T>(n, [&]<typename V>(int64_t i) {
      const V result = score_at<F, M, V>(x, i, in.params, index + i);
      if constexpr (kWrite) __builtin_memcpy(out + i, &result, sizeof(V));
    });
  });
  if constexpr (M == Mode::Update) put_back(in.state, index, n, x.state, buffers.state);
}

// Scores for a kernel that goes on with 64 of them while the next inputs come: what stands between
// two loads is little, and formulas are compiled once.
template <typename T>
class Scorer {
 public:
  Scorer(const ScoreInputs& in, Mode mode, int64_t distance = kAhead)
      : in_(in), mode_(mode), ahead_(in, distance) {
    for_formula(in.formula, [&]<Formula F>() {
      for_mode(mode, [&]<Mode M>() { score_word_ = &Scorer::template score_word<F, M>; });
    });
  }

  // Calls f(scores, element, how many are left) for every 64 elements of index..index + n; 64
  // scores can be read, zeros where fewer are left.
  template <typename F>
  __attribute__((always_inline)) void for_words(int64_t index, int64_t n, F&& f) {
    for (int64_t first = index; first < index + n; first += kRun) {
      const int64_t count = std::min<int64_t>(kRun, index + n - first);
      const Inputs<T> x = fetch(in_, first, count, buffers_);
      for (int64_t i = 0; i < count; i += 64) {
        const int64_t left = count - i;
        alignas(64) T scores[64];
        if (left < 64) std::fill_n(scores + left, 64 - left, T(0));
        (this->*score_word_)(x, i, std::min<int64_t>(left, 64), first + i, scores);
        f(scores, first + i, left);
      }
      if (mode_ == Mode::Update) put_back(in_.state, first, count, x.state, buffers_.state);
    }
  }

 private:
  template <Formula F, Mode M>
  void score_word(const Inputs<T>& x, int64_t i, int64_t n, int64_t index, T* out) const {
    ahead_.template ask<F, M>(index);
    const auto score = [&]<typename V>(int64_t j) __attribute__((always_inline)) {
      const V result = score_at<F, M, V>(x, i + j, in_.params, index + j);
      __builtin_memcpy(out + j, &result, sizeof(V));
    };
    constexpr int lanes = kLanes<T>;
    if (n < 64) return for_lanes<T>(n, score);
    unroll<64 / lanes>([&](auto k) __attribute__((always_inline)) {
      score.template operator()<Vec<T, lanes>>(k * lanes);
    });
  }

  const ScoreInputs& in_;
  Mode mode_;
  Ahead<T> ahead_;
  void (Scorer::*score_word_)(const Inputs<T>&, int64_t, int64_t, int64_t, T*) const;
  RunBuffers<T> buffers_;
};

}  // namespace
}  // namespace secateur
