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

namespace secateur::block_sparse::CUDA::simt {
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
  // What a thread block has of a line that is cut: [thread block][begins here][feature][row].
  void* partial;
  int part_features, tile_batch;  // of a part of a line; rows of the batch
};

template <typename T, int kGroup, int kRows>
struct DsdTile {
  using C = Compute<T>;
  using Left = Tile<T, kRows>;
  static constexpr int kGroups = kWarpFeatures / kGroup;  // of a warp
  static constexpr int kPass = kGroups * kWarps;
  static constexpr int kBatch = Left::kBatch;
  static constexpr int kChunk = kGroup == 8 || sizeof(C) == 8 ? 64 : 128;
  // Of each warp: for each group up to 32 elements, their keys in the tile and their weights.
  static constexpr int kWeights = kWarpFeatures * 32, kKeys = kGroups * 32;
  static constexpr int kShared =
      (kChunk * kBatch + kWarps * kWeights) * sizeof(C) + kWarps * kKeys * sizeof(int);

  // Elements that multiply_add takes at once.
  static constexpr int kAtOnce = kGroup == 8 ? 2 : 4;

  static int64_t tiles(const Problem& p) { return ceil_div(p.batch, kBatch); }
  static Lines lines(const Problem& p) {
    return make_lines(p, p.product == Product::InputGradient, kGroup, kPass, tiles(p));
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

// What the groups of a warp have in a chunk of features, which is staged in `tile`; lane r's
// `group` is group r. Each group has up to 32 elements prepared, then all multiply theirs, and so
// on until the chunk is done.
template <typename T, int kGroup, int kRows>
__device__ void multiply_chunk(const Dsd& a, unsigned chunk, const Compute<T>* tile,
                               Compute<T>* weights, int* keys, Group& group,
                               Compute<T> (&sums)[kWarpFeatures / kGroup][kGroup][kRows]) {
  using Sizes = DsdTile<T, kGroup, kRows>;
  constexpr int kAtOnce = Sizes::kAtOnce;
  const Lines& lines = a.lines;
  const int lane = threadIdx.x % 32;
  const T* const values = static_cast<const T*>(a.values);
  for (;;) {
    const unsigned pending =
        __ballot_sync(kAllLanes, next_feature(lines, group) - chunk < Sizes::kChunk);
    if (pending == 0) break;
    int count = 0;  // of the lane's group
    for (unsigned rest = pending; rest != 0; rest &= rest - 1) {
      const int r = __ffs(static_cast<int>(rest)) - 1;
      const Group of = group_of_lane(group, r);
      const int found = for_elements(lines, of, chunk, Sizes::kChunk, [&](const Element& e) {
        const int64_t place = lines.position ? lines.position[e.block] : e.block;
        const T* const from = values + place * lines.width * lines.inner_width +
                              of.j * a.line_stride + e.l * a.inner_stride;
        Compute<T>* const to = weights + (r * 32 + lane) * kGroup;
#pragma unroll
        for (int t = 0; t < kGroup; ++t)
          to[t] = of.j + t < lines.width ? widen(from[t * a.line_stride]) : Compute<T>{0};
        keys[r * 32 + lane] = Sizes::Left::key(static_cast<int>(e.feature - chunk));
      });
      if (lane == r) count = found;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < Sizes::kGroups; ++r) {
      const int found = __shfl_sync(kAllLanes, count, r);
      const int* const key = keys + r * 32;
      const Compute<T>* const weight = weights + r * 32 * kGroup;
      int e = 0;
#pragma unroll 1
      for (; e + kAtOnce <= found; e += kAtOnce)
        multiply_add<T, kGroup, kRows, kAtOnce>(key + e, weight + e * kGroup, tile, sums[r]);
#pragma unroll 1
      for (; e < found; ++e)
        multiply_add<T, kGroup, kRows, 1>(key + e, weight + e * kGroup, tile, sums[r]);
    }
    __syncwarp();
    group.next += count;
  }
}

// The sums of a warp to `out`, or where their line is cut to the partial sums: by way of shared
// memory, kStored features at a time, so that neighbours in memory are stored at once.
constexpr int kStored = 8;

template <typename T, int kGroup, int kRows, int kGroups>
__device__ void store_sums(const Dsd& a, const Range& range, const Group& group, Compute<T>* space,
                           const Compute<T> (&sums)[kGroups][kGroup][kRows]) {
  using C = Compute<T>;
  constexpr int kBatch = 32 * kRows;
  const Lines& lines = a.lines;
  const int lane = threadIdx.x % 32, own = lane % kStored;
  // Feature f of row m lies at f * kBatch + (m ^ 4 f): 8 features of 4 neighbours, to 32 banks.
#pragma unroll
  for (int first = 0; first < kWarpFeatures; first += kStored) {
    __syncwarp();
#pragma unroll
    for (int f = 0; f < kStored; ++f) {
      Run<C, kRows> run;
#pragma unroll
      for (int i = 0; i < kRows; ++i) run.at[i] = sums[(first + f) / kGroup][f % kGroup][i];
      *reinterpret_cast<Run<C, kRows>*>(space + f * kBatch + (lane * kRows ^ f * 4)) = run;
    }
    __syncwarp();
    const Group of = group_of_lane(group, (first + own) / kGroup);
    const int j = of.j + own % kGroup, feature = of.line * lines.width + j;
    if (of.line < 0 || j >= lines.width || feature >= lines.features) continue;
    const bool begins = first_item(lines, of.line) >= range.begin;
    const bool ends = first_item(lines, of.line + 1) <= range.end;
    C* const partial =
        static_cast<C*>(a.partial) +
        ((int64_t{blockIdx.x} * 2 + begins) * a.part_features + j - range.part * a.part_features) *
            kBatch;
#pragma unroll 1
    for (int m = lane / kStored; m < kBatch; m += 32 / kStored) {
      const C sum = space[own * kBatch + (m ^ own * 4)];
      const int64_t row = range.tile * kBatch + m;
      if (!begins || !ends)
        partial[m] = sum;
      else if (row < a.left.batch)
        static_cast<T*>(a.out)[row * lines.features + feature] = finish<T>(a, sum, feature);
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
  C* const weights = tile + Sizes::kChunk * Sizes::kBatch;
  int* const keys = reinterpret_cast<int*>(weights + kWarps * Sizes::kWeights);
  const Range range(a.lines);
  for (int first = line_of(a.lines, range.begin);
       first < a.lines.count && first_item(a.lines, first) < range.end; first += a.lines.per_pass) {
    Group group;  // lane r's is group r of its warp
    if (lane < kGroups) group = group_of<kGroup>(a.lines, range, first, warp * kGroups + lane);
    C sums[kGroups][kGroup][kRows] = {};
    for (;;) {
      const unsigned next = block_min(next_feature(a.lines, group), nexts);
      if (next == kNone) break;
      const unsigned chunk = next / Sizes::kChunk * Sizes::kChunk;
      Sizes::Left::template stage<Sizes::kChunk>(a.left, range.tile * Sizes::kBatch,
                                                 static_cast<int>(chunk), tile);
      __syncthreads();
      multiply_chunk<T>(a, chunk, tile, weights + warp * Sizes::kWeights,
                        keys + warp * Sizes::kKeys, group, sums);
    }
    store_sums<T>(a, range, group, tile + warp * kStored * Sizes::kBatch, sums);
    __syncthreads();
  }
}

// A line that begins in one range and ends in a later one: the sum of what they have of it.
template <typename T>
__global__ void __launch_bounds__(kThreads) join_kernel(const __grid_constant__ Dsd a) {
  using C = Compute<T>;
  const Lines& lines = a.lines;
  const Range range(lines);
  const int line = line_of(lines, range.end - 1);
  const int64_t end = first_item(lines, line + 1);
  if (first_item(lines, line) < range.begin || end <= range.end) return;
  const int j = range.part * a.part_features, first = line * lines.width + j;
  const int features = min(min(a.part_features, lines.width - j), lines.features - first);
  const C* const sums = static_cast<const C*>(a.partial);
  const int64_t size = int64_t{a.part_features} * a.tile_batch;
  for (int i = threadIdx.x; i < features * a.tile_batch; i += kThreads) {
    const int feature = first + i / a.tile_batch;
    const int64_t row = range.tile * a.tile_batch + i % a.tile_batch;
    if (row >= a.left.batch) continue;
    C sum = sums[(int64_t{blockIdx.x} * 2 + 1) * size + i];
    for (int64_t later = 1; range.begin + later * lines.range_items < end; ++later)
      sum += sums[(blockIdx.x + later) * 2 * size + i];
    static_cast<T*>(a.out)[row * lines.features + feature] = finish<T>(a, sum, feature);
  }
}

template <typename T, int kGroup, int kRows>
int64_t dsd_bytes(const Problem& p) {
  using Sizes = DsdTile<T, kGroup, kRows>;
  const Lines lines = Sizes::lines(p);
  if (lines.ranges == 1) return 0;
  return range_blocks(lines, Sizes::tiles(p)) * 2 * lines.groups * kGroup * Sizes::kBatch *
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
  a.partial = workspace;
  a.part_features = a.lines.groups * kGroup;
  a.tile_batch = Sizes::kBatch;
  const auto blocks = static_cast<unsigned>(range_blocks(a.lines, Sizes::tiles(p)));
  const cudaError_t error = cudaFuncSetAttribute(
      dsd_kernel<T, kGroup, kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, Sizes::kShared);
  if (error != cudaSuccess) return error;
  SECATEUR_LAUNCH((dsd_kernel<T, kGroup, kRows>), blocks, kThreads, Sizes::kShared, stream, a);
  if (a.lines.ranges > 1) SECATEUR_LAUNCH(join_kernel<T>, blocks, kThreads, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace
}  // namespace secateur::block_sparse::CUDA::simt
