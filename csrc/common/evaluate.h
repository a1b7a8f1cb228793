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

// Elements evaluated at a time: weight, gradient, state and score of a run stay in L1.
constexpr int kRun = 1024;
// The same where other work follows each run: so few that the processor, which looks ahead over
// both, asks for the next inputs meanwhile.
constexpr int kShortRun = 128;
// Elements from what is evaluated to what memory is asked for meanwhile, where that helps.
constexpr int64_t kAhead = 2048;

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

// Asks for elements index..index + n of `t`, where they are one stretch of memory. Inlined: a
// compiler takes a function that only prefetches for one without effect, and drops the call.
__attribute__((always_inline)) inline void prefetch(const View& t, int64_t index, int64_t n) {
  if (!t.data || t.ndim != 1 || t.stride[0] != 1) return;
  const int64_t size = t.dtype == Dtype::Double ? 8 : t.dtype == Dtype::Float ? 4 : 2;
  const char* const data = static_cast<const char*>(t.data);
  for (int64_t byte = index * size; byte < (index + n) * size; byte += 64)
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

// For a pass in the order of memory that is at elements index..index + n.
__attribute__((always_inline)) inline void prefetch_ahead(const ScoreInputs& in, int64_t index,
                                                          int64_t n) {
  if (foresees_one_page()) prefetch(in, index + kAhead, n);
}

template <Formula F, Mode M, bool kWrite, typename T>
inline void score_run(const T* w, const T* g, T* state, const ScoreParams& params, int64_t index,
                      int64_t n, T* out) {
  constexpr bool with_weight = needs_weight(F, M);
  constexpr bool with_grad = needs_grad(F, M);
  const auto step = [&]<typename V>(int64_t i) {
    V a{}, b{}, c{};
    if constexpr (with_weight) __builtin_memcpy(&a, w + i, sizeof(V));
    if constexpr (with_grad) __builtin_memcpy(&b, g + i, sizeof(V));
    if constexpr (M != Mode::Observe) __builtin_memcpy(&c, state + i, sizeof(V));
    const V x = score<F, M>(a, b, c, params, index + i);
    if constexpr (M == Mode::Update) __builtin_memcpy(state + i, &c, sizeof(V));
    if constexpr (kWrite) __builtin_memcpy(out + i, &x, sizeof(V));
  };
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) step.template operator()<Vec<T, lanes>>(i);
  for (; i < n; ++i) step.template operator()<T>(i);
}

// Room for the inputs of a run of N elements.
template <typename T, int N = kRun>
struct RunBuffers {
  alignas(64) T weight[N];
  alignas(64) T grad[N];
  alignas(64) T state[N];
};

// Scores of elements index..index + n (n <= N) to `out`; Mode::Update writes the state as well
// (and with kWrite false nothing else).
template <Mode M, bool kWrite = true, typename T, int N>
inline void evaluate(const ScoreInputs& in, int64_t index, int64_t n, RunBuffers<T, N>& buffers,
                     T* out) {
  const T* const w = fetch(in.weight, index, n, buffers.weight);
  const T* const g = fetch(in.grad, index, n, buffers.grad);
  T* state = nullptr;
  if constexpr (M != Mode::Observe)
    state = const_cast<T*>(fetch(in.state, index, n, buffers.state));
  for_formula(in.formula,
              [&]<Formula F>() { score_run<F, M, kWrite>(w, g, state, in.params, index, n, out); });
  if constexpr (M == Mode::Update) {
    if (state == buffers.state) {  // a strided state was gathered: scatter it back
      T* const data = static_cast<T*>(in.state.data);
      for_stretches(in.state, index, n,
                    [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
                      for (int64_t i = 0; i < count; ++i)
                        data[offset + i * stride] = state[first + i];
                    });
    }
  }
}

}  // namespace
}  // namespace secateur
