#pragma once
// dW = dY^T X at live blocks without tensor cores; dtypes and blocks as in dsd.cuh. Every weight is
// summed in one dtype, over one part of the batch after the other, by one thread; parts of the
// batch that run side by side have sums of their own, which round_kernel adds, in order.
//
// outer_kernel, blocks of 8 rows or more: a lane has a column of a block and up to 16 of its rows.
// It reads X beside its neighbours, dY is the same for all, and both are used at once: neither is
// staged. Every warp has the same to do. Bound by fused multiply-adds.
//
// sample_kernel, all others: X is staged as in dsd.cuh, with dY of the lines beside it. The lanes
// of a warp are rows of the batch; each multiplies what it has of a feature and of dY, and 32 such
// products are added up over all lanes at once. Bound by shared memory and that sum.
#include <type_traits>

#include "block_sparse/lines.cuh"

namespace secateur::block_sparse::CUDA::simt {
namespace {

struct Sdd {
  Lines lines;  // of sample_kernel
  Matrix dy, x;
  const int32_t *row_of, *col;
  int rows, cols;
  int64_t n_blocks;
  int64_t splits;       // of the batch
  int64_t split_batch;  // rows of each but the last, in outer_kernel
  bool vectors;         // whether outer_kernel can load dY by 16 bytes
  void* sums;           // of each split, in the dtype that is computed in
};

// ---------------------------------------------------------------- outer products

constexpr int kLeastSplit = 64;  // rows of the batch
constexpr int kOuterDepth = 4;   // rows of the batch that are loaded at a time

// How the blocks' columns lie in the lanes: some whole blocks, or 32 columns of one.
struct OuterShape {
  int blocks_per_warp, column_parts, row_parts;
  int64_t warps;  // for one split

  OuterShape(const Problem& p, int kRows)
      : blocks_per_warp(p.cols < 32 ? 32 / static_cast<int>(p.cols) : 1),
        column_parts(static_cast<int>(ceil_div(p.cols, 32))),
        row_parts(static_cast<int>(ceil_div(p.rows, kRows))),
        warps(ceil_div(p.n_blocks, blocks_per_warp) * column_parts * row_parts) {}
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads)
    outer_kernel(const __grid_constant__ Sdd a, const __grid_constant__ OuterShape shape) {
  using C = Compute<T>;
  const int lane = threadIdx.x % 32;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t split = warp / shape.warps;
  int64_t rest = warp % shape.warps;
  const int j = static_cast<int>(rest % shape.row_parts) * kRows;
  rest /= shape.row_parts;
  const int first_column = static_cast<int>(rest % shape.column_parts) * 32;
  rest /= shape.column_parts;
  const int in_warp = a.cols < 32 ? lane / a.cols : 0;
  const int l = first_column + lane - in_warp * a.cols;
  const int64_t p = rest * shape.blocks_per_warp + in_warp;
  if (split >= a.splits || in_warp >= shape.blocks_per_warp || p >= a.n_blocks || l >= a.cols)
    return;

  const int feature = a.row_of[p] * a.rows + j, k = a.col[p] * a.cols + l;
  const int count = min(kRows, a.rows - j);
  // What sticks out over the edge is zero.
  const int live = k < a.x.features ? min(count, a.dy.features - feature) : 0;
  C sums[kRows] = {};
  if (live > 0) {
    const bool vectors = a.vectors && live == kRows;
    const int64_t begin = split * a.split_batch, end = min(begin + a.split_batch, a.dy.batch);
    const T* x = static_cast<const T*>(a.x.data) + begin * a.x.stride + k;
    const T* dy = static_cast<const T*>(a.dy.data) + begin * a.dy.stride + feature;
    const auto add_row = [&](C right) {
      T left[kRows];
      if (vectors) {
        uint4 loaded[sizeof(left) / kLoadBytes];
#pragma unroll
        for (int v = 0; v < kRows / kVector<T>; ++v)
          loaded[v] = reinterpret_cast<const uint4*>(dy)[v];
        __builtin_memcpy(left, loaded, sizeof(left));
#pragma unroll
        for (int t = 0; t < kRows; ++t) sums[t] += widen(left[t]) * right;
      } else {
#pragma unroll
        for (int t = 0; t < kRows; ++t)
          if (t < live) sums[t] += widen(dy[t]) * right;
      }
      dy += a.dy.stride;
    };
    int64_t m = begin;
    for (; m + kOuterDepth <= end; m += kOuterDepth) {
      T right[kOuterDepth];
#pragma unroll
      for (int u = 0; u < kOuterDepth; ++u) right[u] = x[u * a.x.stride];
#pragma unroll
      for (int u = 0; u < kOuterDepth; ++u) add_row(widen(right[u]));
      x += kOuterDepth * a.x.stride;
    }
    for (; m < end; ++m, x += a.x.stride) add_row(widen(*x));
  }
  C* const to = static_cast<C*>(a.sums) + ((split * a.n_blocks + p) * a.rows + j) * a.cols + l;
#pragma unroll
  for (int t = 0; t < kRows; ++t)
    if (t < count) to[int64_t{t} * a.cols] = t < live ? sums[t] : C{0};
}

// ---------------------------------------------------------------- sampled products

template <typename T, int kGroup>
struct SampleTile {
  using C = Compute<T>;
  using Left = Tile<T, 2>;
  static constexpr int kGroups = 8 / kGroup;  // of a warp
  static constexpr int kPass = kGroups * kWarps;
  static constexpr int kBatch = Left::kBatch;
  static constexpr int kChunk = 192 / (sizeof(C) / 4);
  static constexpr int kHeld = kPass * kGroup;  // features of dY
  static constexpr int kShared = (kChunk + kHeld) * kBatch * sizeof(C) + kWarps * 32 * sizeof(int);
};

// Of 32 sums to each lane one: lane i's is that of sums[i] over all lanes. Half of the lanes go on
// with one half of the sums, half with the other. Recursive, so that every index is a constant.
template <int kHalf, typename C>
__device__ C sum_over_lanes(const C (&sums)[2 * kHalf]) {
  const bool upper = threadIdx.x & kHalf;
  C halves[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const C kept = upper ? sums[i + kHalf] : sums[i], given = upper ? sums[i] : sums[i + kHalf];
    halves[i] = kept + __shfl_xor_sync(kAllLanes, given, kHalf);
  }
  if constexpr (kHalf == 1)
    return halves[0];
  else
    return sum_over_lanes<kHalf / 2>(halves);
}

// What the groups of a warp have in a chunk of X, which is staged in `tile`, to the sums of dW; as
// multiply_chunk. dY of the features from line `first` on is staged in `held`.
template <typename T, int kGroup>
__device__ void sample_chunk(const Sdd& a, unsigned chunk, int first, const Compute<T>* tile,
                             const Compute<T>* held, int* keys, Compute<T>* sums, Group& group) {
  using C = Compute<T>;
  using Sizes = SampleTile<T, kGroup>;
  using Left = typename Sizes::Left;
  constexpr int kAtOnce = 32 / kGroup;
  const Lines& lines = a.lines;
  const int lane = threadIdx.x % 32;
  for (;;) {
    const unsigned pending =
        __ballot_sync(kAllLanes, next_feature(lines, group) - chunk < Sizes::kChunk);
    if (pending == 0) break;
    for (unsigned rest = pending; rest != 0; rest &= rest - 1) {
      const int r = __ffs(static_cast<int>(rest)) - 1;
      const Group of = group_of_lane(group, r);
      const int found = for_elements(lines, of, chunk, Sizes::kChunk, [&](const Element& e) {
        keys[lane] = Left::key(static_cast<int>(e.feature - chunk));
      });
      __syncwarp();
      Run<C, 2> left[kGroup];
#pragma unroll
      for (int t = 0; t < kGroup; ++t)
        left[t] = Left::rows_of_lane(held, Left::key((of.line - first) * a.rows + of.j + t));
      for (int e = 0; e < found; e += kAtOnce) {
        C products[32];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          Run<C, 2> right = {};
          if (e + i < found) right = Left::rows_of_lane(tile, keys[e + i]);
#pragma unroll
          for (int t = 0; t < kGroup; ++t)
            products[i * kGroup + t] = left[t].at[0] * right.at[0] + left[t].at[1] * right.at[1];
        }
        const C sum = sum_over_lanes<16>(products);
        const int i = e + lane / kGroup, j = of.j + lane % kGroup;
        if (i < found && j < a.rows && of.line * a.rows + j < a.dy.features) {
          const int64_t p = of.block + (of.next + i) / a.cols;
          sums[(p * a.rows + j) * a.cols + (of.next + i) % a.cols] += sum;
        }
      }
      __syncwarp();
      if (lane == r) group.next += found;
    }
  }
}

template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    sample_kernel(const __grid_constant__ Sdd a) {
  using C = Compute<T>;
  using Sizes = SampleTile<T, kGroup>;
  using Left = typename Sizes::Left;
  constexpr int kGroups = Sizes::kGroups;
  SECATEUR_DYNAMIC_SHARED(C, tile);
  SECATEUR_SHARED(unsigned, nexts, kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  C* const held = tile + Sizes::kChunk * Sizes::kBatch;
  int* const keys = reinterpret_cast<int*>(held + Sizes::kHeld * Sizes::kBatch);
  const Range range(a.lines);
  const int64_t split = range.tile;
  C* const sums = static_cast<C*>(a.sums) + split * a.n_blocks * a.rows * a.cols;
  for (int first = line_of(a.lines, range.begin);
       first < a.lines.count && first_item(a.lines, first) < range.end; first += a.lines.per_pass) {
    Group whole;  // lane r's is group r of its warp
    if (lane < kGroups) whole = group_of<kGroup>(a.lines, range, first, warp * kGroups + lane);
    const int feature = first * a.rows;
    Matrix dy = a.dy;
    dy.vectors = dy.vectors && feature % kVector<T> == 0;
    for (int64_t row = split * Sizes::kBatch; row < a.x.batch; row += a.splits * Sizes::kBatch) {
      Left::template stage<Sizes::kHeld>(dy, row, feature, held);
      __syncthreads();
      Group group = whole;
      for (;;) {
        const unsigned next = block_min(next_feature(a.lines, group), nexts);
        if (next == kNone) break;
        const unsigned chunk = next / Sizes::kChunk * Sizes::kChunk;
        Left::template stage<Sizes::kChunk>(a.x, row, static_cast<int>(chunk), tile);
        __syncthreads();
        sample_chunk<T, kGroup>(a, chunk, first, tile, held, keys + warp * 32, sums, group);
      }
    }
  }
}

// ---------------------------------------------------------------- both

template <typename T>
__global__ void __launch_bounds__(kThreads)
    round_kernel(const Compute<T>* sums, int64_t splits, int64_t count, T* dw) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    Compute<T> sum = sums[i];
    for (int64_t s = 1; s < splits; ++s) sum += sums[s * count + i];
    dw[i] = narrow<T>(sum);
  }
}

inline bool outer(const Problem& p) { return p.rows >= 8; }

// Calls f.template operator()<kRows>() with the rows of a lane of outer_kernel.
template <typename F>
auto for_outer_rows(const Problem& p, F&& f) {
  return p.rows % 16 == 0 ? f.template operator()<16>() : f.template operator()<8>();
}
// The same with the group of sample_kernel.
template <typename F>
auto for_sample_group(const Problem& p, F&& f) {
  return p.rows == 1 ? f.template operator()<1>() : f.template operator()<4>();
}

template <typename T>
Sdd make_sdd(const Problem& p) {
  Sdd a{};
  a.dy = matrix<T>(p.dy, p.dy_stride, p.batch, p.out_features);
  a.x = matrix<T>(p.x, p.x_stride, p.batch, p.in_features);
  a.row_of = p.row_of;
  a.col = p.col;
  a.rows = static_cast<int>(p.rows);
  a.cols = static_cast<int>(p.cols);
  a.n_blocks = p.n_blocks;
  if (outer(p)) {
    const int64_t warps =
        for_outer_rows(p, [&]<int kRows>() { return OuterShape(p, kRows).warps; });
    const int64_t most = ceil_div(p.batch, kLeastSplit);
    a.splits = std::clamp<int64_t>(kWantedBlocks * kWarps / warps, 1, most);
    a.split_batch = ceil_div(ceil_div(p.batch, a.splits), kOuterDepth) * kOuterDepth;
    a.splits = ceil_div(p.batch, a.split_batch);
    a.vectors = a.dy.vectors && a.rows % kVector<T> == 0;
  } else {
    for_sample_group(p, [&]<int kGroup>() {
      using Sizes = SampleTile<T, kGroup>;
      a.lines = make_lines(p, false, kGroup, Sizes::kPass, 1);
      const int64_t most = ceil_div(p.batch, Sizes::kBatch);
      a.splits = std::clamp<int64_t>(kWantedBlocks / a.lines.ranges, 1, most);
    });
  }
  return a;
}

// Where one split's sums are dW, they are made there.
template <typename T>
constexpr bool sums_are_dw(const Sdd& a) {
  return a.splits == 1 && std::is_same_v<T, Compute<T>>;
}

template <typename T>
int64_t sdd_bytes(const Problem& p) {
  const Sdd a = make_sdd<T>(p);
  return sums_are_dw<T>(a) ? 0 : a.splits * p.n_blocks * p.rows * p.cols * sizeof(Compute<T>);
}

template <typename T>
int run_sdd(const Problem& p, void* workspace, void* stream) {
  Sdd a = make_sdd<T>(p);
  a.sums = sums_are_dw<T>(a) ? p.dw : workspace;
  const int64_t count = p.n_blocks * p.rows * p.cols;
  if (outer(p)) {
    for_outer_rows(p, [&]<int kRows>() {
      const OuterShape shape(p, kRows);
      const auto blocks = static_cast<unsigned>(ceil_div(shape.warps * a.splits, kWarps));
      SECATEUR_LAUNCH((outer_kernel<T, kRows>), blocks, kThreads, 0, stream, a, shape);
    });
  } else {
    // What sticks out over the edge stays zero.
    const int64_t bytes = a.splits * count * sizeof(Compute<T>);
    cudaError_t error = cudaMemsetAsync(a.sums, 0, bytes, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
    for_sample_group(p, [&]<int kGroup>() {
      constexpr int kShared = SampleTile<T, kGroup>::kShared;
      error = cudaFuncSetAttribute(sample_kernel<T, kGroup>,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
      if (error != cudaSuccess) return;
      const auto blocks = static_cast<unsigned>(range_blocks(a.lines, a.splits));
      SECATEUR_LAUNCH((sample_kernel<T, kGroup>), blocks, kThreads, kShared, stream, a);
    });
    if (error != cudaSuccess) return error;
  }
  if (!sums_are_dw<T>(a))
    SECATEUR_LAUNCH(round_kernel<T>, blocks_for(ceil_div(count, kThreads)), kThreads, 0, stream,
                    static_cast<const Compute<T>*>(workspace), a.splits, count,
                    static_cast<T*>(p.dw));
  return cudaGetLastError();
}

}  // namespace
}  // namespace secateur::block_sparse::CUDA::simt
