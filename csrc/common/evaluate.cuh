#pragma once
// Scores of neighbouring logical elements in the registers of one CUDA thread; for cuda.cu files,
// as evaluate.h is for cpu.cpp files. In is ScoreInputs, or the same with less of the views where
// runs are loaded by vectors. S is the storage type of weight and gradient; state and
// scores are of type Compute<S>. Index and length of a run that is loaded by vectors are multiples
// of its N.
#include "common/kernels.cuh"
#include "common/score.h"

namespace secateur {
namespace {

// Whether it can be loaded by vectors; what is not there need not be loaded.
inline bool in_vectors(const View& t) {
  return !t.data || (t.ndim == 1 && t.stride[0] == 1 && aligned(t.data));
}
inline bool in_vectors(const ScoreInputs& in) {
  return in_vectors(in.weight) && in_vectors(in.grad) && in_vectors(in.state);
}

// The dtype of weight and gradient, either or both of which the formula may leave out.
inline Dtype input_dtype(const ScoreInputs& in, bool wide) {
  return in.weight.data ? in.weight.dtype
         : in.grad.data ? in.grad.dtype
         : wide         ? Dtype::Double
                        : Dtype::Float;
}

// What N scores are made of; zero where there is no such input.
template <typename T, int N>
struct Operands {
  T weight[N], grad[N], state[N];
};

// N elements as they lie in memory.
template <typename S, int N>
struct Packed {
  static constexpr int kPerVector = kLoadBytes / sizeof(S);
  static_assert(N % kPerVector == 0);

  uint4 vectors[N / kPerVector] = {};

  __device__ void load(const void* memory, int64_t index) {
    if (!memory) return;
    const S* const data = global(static_cast<const S*>(memory));
    const uint4* const from = reinterpret_cast<const uint4*>(data + index);
#pragma unroll
    for (int v = 0; v < N / kPerVector; ++v) vectors[v] = from[v];
  }

  __device__ void widen_to(Compute<S> (&out)[N]) const {
#pragma unroll
    for (int v = 0; v < N / kPerVector; ++v) {
      S part[kPerVector];
      __builtin_memcpy(part, &vectors[v], sizeof(part));
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) out[v * kPerVector + i] = widen(part[i]);
    }
  }
};

// A run of inputs that lie as in_vectors() wants. Nothing is computed before all of it is asked
// for: one use between two loads, and the second would wait for the first.
template <typename S, int N>
struct PackedOperands {
  Packed<S, N> weight, grad;
  Packed<Compute<S>, N> state;

  template <typename In>
  __device__ void load(const In& in, int64_t index) {
    weight.load(in.weight.data, index);
    grad.load(in.grad.data, index);
    state.load(in.state.data, index);
  }

  __device__ Operands<Compute<S>, N> widened() const {
    Operands<Compute<S>, N> x;
    weight.widen_to(x.weight);
    grad.widen_to(x.grad);
    state.widen_to(x.state);
    return x;
  }
};

// Elements index..index + count, count < N, of inputs that lie as in_vectors() wants; zero in the
// others.
template <typename S, int N, typename In>
__device__ Operands<Compute<S>, N> load_first(const In& in, int64_t index, int count) {
  Operands<Compute<S>, N> x = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) break;
    if (in.weight.data)
      x.weight[i] = widen(global(static_cast<const S*>(in.weight.data))[index + i]);
    if (in.grad.data) x.grad[i] = widen(global(static_cast<const S*>(in.grad.data))[index + i]);
    if (in.state.data)
      x.state[i] = global(static_cast<const Compute<S>*>(in.state.data))[index + i];
  }
  return x;
}

// Where element `index` lies, any layout.
__device__ inline int64_t offset_of(const View& t, int64_t index) {
  return t.ndim == 1 ? index * t.stride[0] : locate(t, index).offset;
}

// Element `index` in the compute type T, any layout and dtype; zero where there is no input.
template <typename T>
__device__ T load_element(const View& t, int64_t index) {
  if (!t.data) return T(0);
  const int64_t offset = offset_of(t, index);
  if constexpr (sizeof(T) == 8) return global(static_cast<const double*>(t.data))[offset];
  if (t.dtype == Dtype::BFloat16)
    return widen(global(static_cast<const BFloat16*>(t.data))[offset]);
  if (t.dtype == Dtype::Half) return widen(global(static_cast<const Half*>(t.data))[offset]);
  return global(static_cast<const float*>(t.data))[offset];
}

// What the score of element `index` is made of, any layout and dtypes.
template <typename T>
__device__ Operands<Compute<T>, 1> load_one(const ScoreInputs& in, int64_t index) {
  using C = Compute<T>;
  return {{load_element<C>(in.weight, index)},
          {load_element<C>(in.grad, index)},
          {load_element<C>(in.state, index)}};
}

// The scores of elements index..index + N; Mode::Update leaves the new state in x.state. The steps
// of score() in common/score.h one after the other for all elements, so that the code of a formula
// is there once for all modes.
template <typename T, int N, typename In>
__device__ void scores(const In& in, Mode mode, Operands<T, N>& x, int64_t index, T (&out)[N]) {
  if (mode == Mode::State) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = recall(x.state[i], in.params);
  } else {
    for_formula(in.formula, [&]<Formula F>() {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = observe<F>(x.weight[i], x.grad[i], in.params, index + i);
    });
  }
  if (mode == Mode::Update) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = x.state[i] = average(x.state[i], out[i], in.params);
  }
  for_formula(in.formula, [&]<Formula F>() {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = finish<F>(out[i], x.weight[i]);
  });
}

// A score as an integer of which the larger is better; 0.0 and -0.0 have the same.
template <typename T>
SECATEUR_HD Int<T> key_of(T score, bool largest) {
  constexpr int sign = sizeof(T) * 8 - 1;
  const Int<T> bits = bits_as<Int<T>>(score + T(0));
  const Int<T> key = bits ^ ((bits >> sign) & ~(Int<T>{1} << sign));
  return largest ? key : ~key;
}

// The same by a mode that is known.
template <Mode M, typename T, int N>
__device__ void scores(const ScoreInputs& in, Operands<T, N>& x, int64_t index, T (&out)[N]) {
  scores(in, M, x, index, out);
}

// Stores one element, or N at an address that is aligned to vectors. kGlobal: vectors go to global
// memory by an instruction for it; in kernels that fill shared memory, too, nvcc tore plain stores
// into elements.
template <bool kGlobal, typename T, int N>
__device__ void store_run(T* to, const T (&x)[N]) {
  if constexpr (N == 1) {
    *to = x[0];
  } else {
    constexpr int per_vector = kLoadBytes / sizeof(T);
    static_assert(N % per_vector == 0);
#pragma unroll
    for (int v = 0; v < N / per_vector; ++v) {
      uint4 vector;
      __builtin_memcpy(&vector, x + v * per_vector, sizeof(vector));
      uint4* const place = reinterpret_cast<uint4*>(to) + v;
      if constexpr (kGlobal)
        __stcg(place, vector);
      else
        *place = vector;
    }
  }
}

}  // namespace
}  // namespace secateur
