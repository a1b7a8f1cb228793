#pragma once
// Y = X W^T and dX = dY W without tensor cores: float and double as they are, bfloat16 and float16
// widened to float; blocks of any shape. Bound by fused multiply-adds or, where blocks are small,
// by reading the staged operand from shared memory.
//
// A warp keeps 16 features of the result in registers, its lanes 1, 2 or 4 rows of the batch each:
// a live weight is broadcast, multiplied by what the lanes read of the operand, and added. The
// features are groups of kGroup of one line, which read the operand once for all: 8 where blocks
// are so wide, 4, or 1. The operand is staged by chunks of its features, transposed; a chunk that
// no line of the thread block needs is skipped. So large blocks stage what they multiply and little
// else, and for small ones a chunk serves 128 features of the result.
//
// A line that is cut between ranges leaves partial sums, which join_kernel adds, in order.
#include "block_sparse/lines.cuh"
#include "common/activation.h"

namespace secateur::block_sparse::CUDA {
namespace {

constexpr int kWarpFeatures = 16;

struct Dsd {
  Lines lines;
  Matrix left;
  const void* values;
  int64_t line_stride, inner_stride;  // within a block
  const void* bias;                   // may be null
  Activation activation;
  void* out;
  bool vectors;   // runs of a line's features in `out` can be stored by 16 bytes
  void* partial;  // two lines of each thread block: one that began before, one that goes on after
};

template <typename T, int kGroup, int kRows>
struct DsdTile {
  using C = Compute<T>;
  using Left = Tile<T, kRows>;
  static constexpr int kGroups = kWarpFeatures / kGroup;  // of a warp
  static constexpr int kPass = kGroups * kWarps;
  static constexpr int kBatch = Left::kBatch;
  static constexpr int kChunk = (kGroup == 8 ? 64 : 128) / (sizeof(C) / 4);
  // Of each warp: for each group up to 32 elements, their keys in the tile and their weights.
  static constexpr int kWeights = kWarpFeatures * 32, kKeys = kGroups * 32;
  static constexpr int kShared =
      (kChunk * kBatch + kWarps * kWeights) * sizeof(C) + kWarps * kKeys * sizeof(int);

  static Lines lines(const Problem& p) {
    return make_lines(p, p.product == Product::InputGradient, kGroup, kPass, tiles(p));
  }
  static int64_t tiles(const Problem& p) { return ceil_div(p.batch, kBatch); }

  // Elements of the partial sums of one line.
  __host__ __device__ static int64_t line_size(const Lines& a) {
    return int64_t{a.groups} * kGroup * kBatch;
  }
};

// What is done to a sum before it is rounded to T and written.
template <typename T>
__device__ T finish(const Dsd& a, Compute<T> sum, int feature) {
  if (a.bias) sum += widen(static_cast<const T*>(a.bias)[feature]);
  if (a.activation == Activation::Relu) sum = relu(sum);
  if (a.activation == Activation::Gelu) sum = gelu(sum);
  return narrow<T>(sum);
}

// sums += weights * left for kCount elements of a group, whose keys and weights are in order.
template <typename T, int kGroup, int kRows, int kCount>
__device__ void multiply_add(const int* keys, const Compute<T>* weights, const Compute<T>* tile,
                             Compute<T> (&sums)[kGroup][kRows]) {
  using C = Compute<T>;
  constexpr int kAtOnce =
      kCount * kGroup * sizeof(C) % kLoadBytes == 0 ? kLoadBytes / sizeof(C) : 1;
  const Run<int, kCount> key = *reinterpret_cast<const Run<int, kCount>*>(keys);
  C w[kCount * kGroup];
#pragma unroll
  for (int i = 0; i < kCount * kGroup; i += kAtOnce) {
    const Run<C, kAtOnce> run = *reinterpret_cast<const Run<C, kAtOnce>*>(weights + i);
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) w[i + v] = run.at[v];
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const Run<C, kRows> left = Tile<T, kRows>::rows_of_lane(tile, key.at[e]);
#pragma unroll
    for (int t = 0; t < kGroup; ++t)
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[t][i] += w[e * kGroup + t] * left.at[i];
  }
}

// Sums of a group to `out`, or to the partial sums of its line.
template <typename T, int kGroup, int kRows>
__device__ void store_group(const Dsd& a, const Range& range, int line, int j,
                            const Compute<T> (&sums)[kGroup][kRows]) {
  using C = Compute<T>;
  using Sizes = DsdTile<T, kGroup, kRows>;
  const Lines& lines = a.lines;
  const int row = threadIdx.x % 32 * kRows;
  const bool begins = first_item(lines, line) >= range.begin;
  const bool ends = first_item(lines, line + 1) <= range.end;
  if (!begins || !ends) {
    C* const to = static_cast<C*>(a.partial) +
                  (int64_t{blockIdx.x} * 2 + begins) * Sizes::line_size(lines) +
                  (j - range.part * lines.groups * kGroup) * Sizes::kBatch + row;
#pragma unroll
    for (int t = 0; t < kGroup; ++t) {
      Run<C, kRows> run;
#pragma unroll
      for (int i = 0; i < kRows; ++i) run.at[i] = sums[t][i];
      *reinterpret_cast<Run<C, kRows>*>(to + t * Sizes::kBatch) = run;
    }
    return;
  }
  const int feature = line * lines.width + j;
  const int count = min(min(kGroup, lines.width - j), lines.features - feature);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t m = range.tile * Sizes::kBatch + row + i;
    if (m >= a.left.batch) return;
    T result[kGroup];
#pragma unroll
    for (int t = 0; t < kGroup; ++t)
      if (t < count) result[t] = finish<T>(a, sums[t][i], feature + t);
    T* const to = static_cast<T*>(a.out) + m * lines.features + feature;
    constexpr int kBytes = sizeof(result);
    if (kBytes % kLoadBytes == 0 && a.vectors && count == kGroup) {
      uint4 vectors[(kBytes + kLoadBytes - 1) / kLoadBytes];
      __builtin_memcpy(vectors, result, kBytes);
#pragma unroll
      for (int v = 0; v < kBytes / kLoadBytes; ++v) reinterpret_cast<uint4*>(to)[v] = vectors[v];
    } else {
#pragma unroll
      for (int t = 0; t < kGroup; ++t)
        if (t < count) to[t] = result[t];
    }
  }
}

template <typename T, int kGroup, int kRows>
__global__ void __launch_bounds__(kThreads, 2) dsd_kernel(const __grid_constant__ Dsd a) {
  using C = Compute<T>;
  using Sizes = DsdTile<T, kGroup, kRows>;
  constexpr int kGroups = Sizes::kGroups;
  SECATEUR_DYNAMIC_SHARED(C, tile);
  SECATEUR_SHARED(unsigned, nexts, kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  C* const weights = tile + Sizes::kChunk * Sizes::kBatch + warp * Sizes::kWeights;
  int* const keys =
      reinterpret_cast<int*>(tile + Sizes::kChunk * Sizes::kBatch + kWarps * Sizes::kWeights) +
      warp * Sizes::kKeys;
  const Lines& lines = a.lines;
  const Range range(lines);
  const T* const values = static_cast<const T*>(a.values);
  for (int first = line_of(lines, range.begin);
       first < lines.count && first_item(lines, first) < range.end; first += lines.per_pass) {
    // Lane r knows of group r of its warp.
    Group group;
    if (lane < kGroups) group = group_of<kGroup>(lines, range, first, warp * kGroups + lane);
    C sums[kGroups][kGroup][kRows] = {};
    for (;;) {
      unsigned feature = next_feature(lines, group);
      const unsigned least = block_min(feature, nexts);
      if (least == kNone) break;
      const unsigned chunk = least / Sizes::kChunk * Sizes::kChunk;
      Sizes::Left::template stage<Sizes::kChunk>(a.left, range.tile * Sizes::kBatch,
                                                 static_cast<int>(chunk), tile);
      __syncthreads();
      // Each group has up to 32 elements prepared, all groups multiply theirs, and so on until the
      // chunk is done.
      for (;;) {
        const unsigned pending = __ballot_sync(kAll, feature - chunk < Sizes::kChunk);
        if (pending == 0) break;
        int count = 0;  // of the lane's group
        for (unsigned rest = pending; rest != 0; rest &= rest - 1) {
          const int r = __ffs(static_cast<int>(rest)) - 1;
          const int block = __shfl_sync(kAll, group.block, r);
          const int at = __shfl_sync(kAll, group.next, r) + lane;
          const int end = __shfl_sync(kAll, group.end, r);
          const int j = __shfl_sync(kAll, group.j, r);
          bool here = at < end;
          if (here) {
            const Element e = element(lines, block, at);
            here = e.feature - chunk < Sizes::kChunk;
            if (here) {
              const int64_t place = lines.position ? lines.position[e.block] : e.block;
              const T* const from = values + place * lines.width * lines.inner_width +
                                    j * a.line_stride + e.l * a.inner_stride;
              C* const to = weights + (r * 32 + lane) * kGroup;
#pragma unroll
              for (int t = 0; t < kGroup; ++t)
                to[t] = j + t < lines.width ? widen(from[t * a.line_stride]) : C{0};
              keys[r * 32 + lane] = Sizes::Left::key(static_cast<int>(e.feature - chunk));
            }
          }
          const int found = __popc(__ballot_sync(kAll, here));
          if (lane == r) count = found;
        }
        __syncwarp();
#pragma unroll
        for (int r = 0; r < kGroups; ++r) {
          if ((pending >> r & 1) == 0) continue;
          const int found = __shfl_sync(kAll, count, r);
          const int* const key = keys + r * 32;
          const C* const weight = weights + r * 32 * kGroup;
          int e = 0;
          for (; e + 4 <= found; e += 4)
            multiply_add<T, kGroup, kRows, 4>(key + e, weight + e * kGroup, tile, sums[r]);
          for (; e < found; ++e)
            multiply_add<T, kGroup, kRows, 1>(key + e, weight + e * kGroup, tile, sums[r]);
        }
        __syncwarp();
        group.next += count;
        feature = next_feature(lines, group);
      }
    }
#pragma unroll
    for (int r = 0; r < kGroups; ++r) {
      const int line = __shfl_sync(kAll, group.line, r);
      const int j = __shfl_sync(kAll, group.j, r);
      if (line >= 0 && line * lines.width + j < lines.features)
        store_group<T>(a, range, line, j, sums[r]);
    }
  }
}

// A line that begins in one range and ends in a later one: the sum of what they have of it.
template <typename T, int kGroup, int kRows>
__global__ void __launch_bounds__(kThreads) join_kernel(const __grid_constant__ Dsd a) {
  using C = Compute<T>;
  using Sizes = DsdTile<T, kGroup, kRows>;
  const Lines& lines = a.lines;
  const Range range(lines);
  const int line = line_of(lines, range.end - 1);
  const int64_t end = first_item(lines, line + 1);
  if (first_item(lines, line) < range.begin || end <= range.end) return;
  const int j = range.part * lines.groups * kGroup;
  const int features =
      min(min(lines.groups * kGroup, lines.width - j), lines.features - line * lines.width - j);
  const C* const sums = static_cast<const C*>(a.partial);
  const int64_t size = Sizes::line_size(lines);
  for (int i = threadIdx.x; i < features * Sizes::kBatch; i += kThreads) {
    const int feature = line * lines.width + j + i / Sizes::kBatch;
    const int64_t m = range.tile * Sizes::kBatch + i % Sizes::kBatch;
    if (m >= a.left.batch) continue;
    C sum = sums[(int64_t{blockIdx.x} * 2 + 1) * size + i];
    for (int64_t later = 1; range.begin + later * lines.range_items < end; ++later)
      sum += sums[(blockIdx.x + later) * 2 * size + i];
    static_cast<T*>(a.out)[m * lines.features + feature] = finish<T>(a, sum, feature);
  }
}

template <typename T, int kGroup, int kRows>
int64_t dsd_bytes(const Problem& p) {
  using Sizes = DsdTile<T, kGroup, kRows>;
  const Lines lines = Sizes::lines(p);
  if (lines.ranges == 1) return 0;
  return range_blocks(lines, Sizes::tiles(p)) * 2 * Sizes::line_size(lines) *
         static_cast<int64_t>(sizeof(Compute<T>));
}

template <typename T, int kGroup, int kRows>
int run_dsd(const Problem& p, void* workspace, void* stream) {
  using Sizes = DsdTile<T, kGroup, kRows>;
  const bool forward = p.product == Product::Forward;
  Dsd a{};
  a.lines = Sizes::lines(p);
  a.left = forward ? matrix<T>(p.x, p.x_stride, p.batch, p.in_features)
                   : matrix<T>(p.dy, p.dy_stride, p.batch, p.out_features);
  a.values = p.values;
  a.line_stride = forward ? p.cols : 1;
  a.inner_stride = forward ? 1 : p.cols;
  a.bias = p.bias;
  a.activation = p.activation;
  a.out = p.out;
  a.vectors = aligned(p.out) && a.lines.features * sizeof(T) % kLoadBytes == 0 &&
              a.lines.width * sizeof(T) % kLoadBytes == 0;
  a.partial = workspace;
  const auto blocks = static_cast<unsigned>(range_blocks(a.lines, Sizes::tiles(p)));
  const auto kernel = dsd_kernel<T, kGroup, kRows>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Sizes::kShared);
  if (error != cudaSuccess) return error;
  SECATEUR_LAUNCH(kernel, blocks, kThreads, Sizes::kShared, stream, a);
  if (a.lines.ranges > 1)
    SECATEUR_LAUNCH((join_kernel<T, kGroup, kRows>), blocks, kThreads, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace
}  // namespace secateur::block_sparse::CUDA
