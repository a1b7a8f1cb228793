// N:M masks on CUDA: an element is kept if fewer than n of its group are better; of equals the
// lower index is. Bound by reading the inputs once; scores are made in registers with
// common/score.h, rounded as on the CPU (-fmad=false). Groups of 1, 2, 4 or 8 that fill the rows of
// contiguous inputs: a thread takes eight elements by 16-byte loads and makes one byte of the mask
// from its registers. All others: a block leaves the keys of a tile, and of what its groups reach
// beyond it, in shared memory; neighbouring blocks judge a group that they share alike, and each
// writes its own part.
#include <limits>

#include "common/evaluate.cuh"
#include "nm/nm.h"

namespace secateur::nm::CUDA {
namespace {

constexpr int kByte = 8;  // elements of one byte of the mask
constexpr int kTile = 2048;

// Worse than the key of any finite score.
template <typename T>
constexpr Int<T> kWorst = std::numeric_limits<Int<T>>::min();

template <typename T>
__device__ Int<T> key_of(T score, bool largest, bool& bad) {
  bad |= bits_as<Int<T>>(absolute(score)) >= bits_as<Int<T>>(std::numeric_limits<T>::infinity());
  return secateur::key_of(score, largest);
}

// Which of eight keys are among the n best of their group of P.
template <int P, typename K>
__device__ uint32_t best(const K (&keys)[kByte], int64_t n) {
  int better[kByte] = {};
#pragma unroll
  for (int i = 0; i < kByte; ++i) {
#pragma unroll
    for (int j = i + 1; j < (i / P + 1) * P; ++j) {
      const bool first = keys[i] >= keys[j];
      better[j] += first;
      better[i] += !first;
    }
  }
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < kByte; ++i) kept |= uint32_t{better[i] < n} << i;
  return kept;
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    aligned_kernel(const __grid_constant__ Args a, uint32_t* bad) {
  using T = Compute<S>;
  bool found = false;
  const int64_t step = int64_t{gridDim.x} * kThreads * kByte;
  int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kByte;
  for (; index < a.numel; index += step) {
    const int count = a.numel - index < kByte ? static_cast<int>(a.numel - index) : kByte;
    Operands<T, kByte> operands;
    if (count == kByte) {
      PackedOperands<S, kByte> packed;
      packed.load(a.inputs, index);
      operands = packed.widened();
    } else {
      operands = load_first<S, kByte>(a.inputs, index, count);
    }
    T x[kByte];
    scores(a.inputs, a.mode, operands, index, x);
    Int<T> keys[kByte];
#pragma unroll
    for (int i = 0; i < kByte; ++i)
      keys[i] = i < count ? key_of(x[i], a.largest, found) : kWorst<T>;
    const uint32_t kept = a.m == 8   ? best<8>(keys, a.n)
                          : a.m == 4 ? best<4>(keys, a.n)
                          : a.m == 2 ? best<2>(keys, a.n)
                                     : best<1>(keys, a.n);
    a.mask[index / kByte] = static_cast<uint8_t>(kept & ((1u << count) - 1));
  }
  report(bad, 1, found);
}

// Groups near a tile, by offsets from its first element.
struct Groups {
  struct Group {
    int begin, end;
  };

  int64_t n_cols, col;  // the column of the first element
  int m, phase;         // how many elements of its group precede it

  __device__ Groups(const Args& a, int64_t first)
      : n_cols(a.n_cols),
        col(first % a.n_cols),
        m(static_cast<int>(a.m)),
        phase(static_cast<int>(col % a.m)) {}

  // The group of the element at `offset`, 0 <= offset < kTile.
  __device__ Group of(int offset) const {
    int64_t at = col + offset;
    int before = (phase + offset) % m;
    if (at >= n_cols) {
      // In a later row, so less than a tile from the end of the first: 32 bits are enough.
      const int past = static_cast<int>(at - n_cols);
      at = n_cols > past ? past : past % static_cast<int>(n_cols);
      before = static_cast<int>(at) % m;
    }
    const int begin = offset - before;
    const int64_t rest = n_cols - (at - before);
    return {begin, begin + (rest < m ? static_cast<int>(rest) : m)};
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    padded_kernel(const __grid_constant__ Args a, uint32_t* bad) {
  SECATEUR_SHARED(Int<T>, shared, kTile + 2 * kMaxGroup);
  Int<T>* const keys = shared + kMaxGroup;  // of the tile's elements, and of some on either side
  const int lane = threadIdx.x % 32;
  bool found = false;
  for (int64_t first = int64_t{blockIdx.x} * kTile; first < a.numel;
       first += int64_t{gridDim.x} * kTile) {
    const int count = a.numel - first < kTile ? static_cast<int>(a.numel - first) : kTile;
    const Groups groups(a, first);
    const int begin = groups.of(0).begin, end = groups.of(count - 1).end;
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      Operands<T, 1> operands = load_one<T>(a.inputs, first + i);
      T x[1];
      scores(a.inputs, a.mode, operands, first + i, x);
      keys[i] = key_of(x[0], a.largest, found);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
      bool kept = false;
      if (i < count) {
        const auto [from, to] = groups.of(i);
        const Int<T> own = keys[i];
        int better = 0;
        for (int j = from; j < to; ++j) better += j < i ? keys[j] >= own : keys[j] > own;
        kept = better < a.n;
      }
      const uint32_t word = __ballot_sync(kAllLanes, kept);
      // The first four lanes write a byte each.
      const int at = i - lane + kByte * lane;
      if (lane < 4 && at < count)
        a.mask[(first + at) / kByte] = static_cast<uint8_t>(word >> kByte * lane);
    }
    __syncthreads();
  }
  report(bad, 1, found);
}

template <typename S>
void run_typed(const Args& a, uint32_t* bad, void* stream) {
  const bool vectors = kByte % a.m == 0 && a.n_cols % a.m == 0 && in_vectors(a.inputs);
  const int64_t tile = vectors ? kThreads * kByte : kTile;
  const unsigned blocks = blocks_for(ceil_div(a.numel, tile));
  if (vectors)
    SECATEUR_LAUNCH(aligned_kernel<S>, blocks, kThreads, 0, stream, a, bad);
  else
    SECATEUR_LAUNCH(padded_kernel<Compute<S>>, blocks, kThreads, 0, stream, a, bad);
}

}  // namespace

int run(const Args& args, uint32_t* bad, void* stream) {
  for_dtype(input_dtype(args.inputs, args.wide),
            [&]<typename S>() { run_typed<S>(args, bad, stream); });
  return cudaGetLastError();
}

}  // namespace secateur::nm::CUDA
