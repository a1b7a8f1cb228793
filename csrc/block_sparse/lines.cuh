#pragma once
// What the exact kernels of dsd.cuh and sdd.cuh share: how live blocks are dealt out to thread
// blocks, and how X or dY comes to shared memory.
#include <cstdint>

#include "block_sparse/block_sparse.h"
#include "common/kernels.cuh"

namespace secateur::block_sparse::CUDA::simt {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr unsigned kNone = 0xffffffffu;  // no feature

// ---------------------------------------------------------------- the left operand

// X or dY.
struct Matrix {
  const void* data;
  int64_t stride, batch;
  int features;
  bool vectors;  // a row can be loaded by 16 bytes, from feature 0 on
};

template <typename T>
Matrix matrix(const void* data, int64_t stride, int64_t batch, int64_t features) {
  const bool vectors = aligned(data) && stride * sizeof(T) % kLoadBytes == 0;
  return {data, stride, batch, static_cast<int>(features), vectors};
}

template <typename T>
constexpr int kVector = kLoadBytes / sizeof(T);  // elements

// Elements that are loaded and stored at once.
template <typename C, int kCount>
struct alignas(sizeof(C) * kCount) Run {
  C at[kCount];
};

// Features [feature, feature + kVector) of a row, the first a multiple of kVector; zero where there
// are none.
template <typename T>
__device__ uint4 load_vector(const Matrix& from, int64_t row, int feature) {
  uint4 vector = {0, 0, 0, 0};
  if (row >= from.batch || feature >= from.features) return vector;
  const T* const data = static_cast<const T*>(from.data) + row * from.stride + feature;
  if (from.vectors && feature + kVector<T> <= from.features)
    return *reinterpret_cast<const uint4*>(data);
  T part[kVector<T>] = {};
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (feature + i < from.features) part[i] = data[i];
  __builtin_memcpy(&vector, part, sizeof(vector));
  return vector;
}

// A tile of the left operand in shared memory, transposed: kBatch rows of the batch, of which each
// lane takes kRows neighbours. Feature k of row m lies at key(k) ^ m. A warp stores what it has
// loaded, 8 vectors of 4 rows, to 32 banks: the 4 rows are neighbours there, and key() moves each
// vector's features to other banks than the next one's.
template <typename T, int kRows>
struct Tile {
  static constexpr int kBatch = 32 * kRows;
  static constexpr int kVectors = 8;
  static constexpr int kFeatures = kVectors * kVector<T>;  // the fewest
  using C = Compute<T>;

  __device__ static int key(int k) { return k * kBatch | k / kVector<T> % kVectors * 4; }

  __device__ static const Run<C, kRows>& rows_of_lane(const C* tile, int key) {
    return *reinterpret_cast<const Run<C, kRows>*>(tile + (key ^ threadIdx.x % 32 * kRows));
  }

  // Called by all threads of a block; `first` is a multiple of kVector.
  template <int kChunk>
  __device__ static void stage(const Matrix& from, int64_t row, int first, C* tile) {
    static_assert(kChunk % kFeatures == 0);
    constexpr int kColumns = kChunk / kFeatures, kParts = kColumns * kBatch / 4;
    constexpr int kMost = sizeof(T) == 2 ? 2 : 4;  // the sums leave that many registers
    constexpr int kInFlight = std::min(kParts / kWarps, kMost);
    static_assert(kParts % (kWarps * kInFlight) == 0);
    const int lane = threadIdx.x % 32;
    for (int part = threadIdx.x / 32; part < kParts; part += kWarps * kInFlight) {
      uint4 vectors[kInFlight];
      const auto k = [&](int u) {
        return ((part + u * kWarps) % kColumns * kVectors + lane % kVectors) * kVector<T>;
      };
      const auto m = [&](int u) { return (part + u * kWarps) / kColumns * 4 + lane / kVectors; };
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        vectors[u] = load_vector<T>(from, row + m(u), first + k(u));
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        T elements[kVector<T>];
        __builtin_memcpy(elements, &vectors[u], sizeof(elements));
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) tile[key(k(u) + i) ^ m(u)] = widen(elements[i]);
      }
    }
  }
};

// ---------------------------------------------------------------- lines of blocks

// The pattern seen from the result: a line is a block row, or in InputGradient a block column. Its
// live blocks, one after the other, are a sequence of elements along the inner dimension, whose
// features ascend.
//
// Work is counted in items: each line is one, followed by its live blocks. A thread block takes one
// range of them, wherever it cuts a line, so that ranges are equal work however the blocks are
// spread. It goes through them in passes: some lines at a time, in groups of kGroup features, one
// after the other in the registers of its warps. A line of more groups than a pass has is dealt
// with in parts.
struct Lines {
  const int32_t *ptr, *index, *position;  // position: of a block in the values; null: in order
  int count, width, inner_width;
  int features, inner_features;
  int groups, per_pass, parts;  // groups of a part of a line; lines in a pass; parts of a line
  int64_t items, ranges, range_items;
};

// Thread blocks to aim for: some for every multiprocessor. Not asked of the device, so that results
// don't depend on it.
constexpr int64_t kWantedBlocks = 512;

// Seen from the rows unless `columns`; `pass` groups of `group` features in a pass; each range is
// taken by `tiles` thread blocks.
inline Lines make_lines(const Problem& p, bool columns, int group, int pass, int64_t tiles) {
  Lines a{};
  a.ptr = columns ? p.col_ptr : p.row_ptr;
  a.index = columns ? p.row_t : p.col;
  a.position = columns ? p.position_t : nullptr;
  a.count = static_cast<int>(columns ? p.block_cols : p.block_rows);
  a.width = static_cast<int>(columns ? p.cols : p.rows);
  a.inner_width = static_cast<int>(columns ? p.rows : p.cols);
  a.features = static_cast<int>(columns ? p.in_features : p.out_features);
  a.inner_features = static_cast<int>(columns ? p.out_features : p.in_features);
  const int64_t groups = ceil_div(a.width, group);
  a.parts = static_cast<int>(ceil_div(groups, pass));
  a.groups = static_cast<int>(ceil_div(groups, a.parts));
  a.per_pass = pass / a.groups;
  // A range has four weights or more for each feature that it may have to stage.
  a.items = p.n_blocks + a.count;
  const int64_t least = std::max<int64_t>(1, 4 * int64_t{a.inner_features} / (p.rows * p.cols));
  const int64_t most = std::max<int64_t>(1, kWantedBlocks / (tiles * a.parts));
  a.range_items = std::max(ceil_div(a.items, most), least);
  a.ranges = ceil_div(a.items, a.range_items);
  return a;
}

// The first item of a line.
__device__ inline int64_t first_item(const Lines& a, int line) {
  return int64_t{a.ptr[line]} + line;
}

// The line of an item; called by all threads of a block, each of which looks at one of the lines
// that are left.
__device__ inline int line_of(const Lines& a, int64_t item) {
  int first = 0, count = a.count;
  while (count > 1) {
    const int step = (count - 1) / kThreads + 1;
    const int probe = static_cast<int>(threadIdx.x) * step;
    const int before = __syncthreads_count(probe < count && first_item(a, first + probe) <= item);
    first += (before - 1) * step;
    count = min(step, count - (before - 1) * step);
  }
  return first;
}

// What one thread block does: items [begin, end), for one part of each line.
struct Range {
  int64_t index, begin, end;
  int part;
  int64_t tile;

  __device__ explicit Range(const Lines& a) {
    const int64_t rest = blockIdx.x / a.ranges;
    index = blockIdx.x % a.ranges;
    begin = index * a.range_items;
    end = min(begin + a.range_items, a.items);
    part = static_cast<int>(rest % a.parts);
    tile = rest / a.parts;
  }
};

inline int64_t range_blocks(const Lines& a, int64_t tiles) { return a.ranges * a.parts * tiles; }

// A group and what is left of it: elements [next, end) of the line whose blocks begin at `block`.
struct Group {
  int line = -1;  // none
  int j = 0;      // the group's first feature within the line
  int block = 0, next = 0, end = 0;
};

// Group `g` of the pass that begins at line `first`.
template <int kGroup>
__device__ Group group_of(const Lines& a, const Range& range, int first, int g) {
  Group group;
  const int line = first + g / a.groups;
  const int j = (range.part * a.groups + g % a.groups) * kGroup;
  if (g >= a.per_pass * a.groups || line >= a.count || j >= a.width) return group;
  const int64_t item = first_item(a, line);
  if (item >= range.end) return group;
  group.line = line;
  group.j = j;
  group.block = a.ptr[line];
  const int from = static_cast<int>(max(range.begin - item - 1, int64_t{0}));
  const int to =
      static_cast<int>(min(range.end - item - 1, int64_t{a.ptr[line + 1]} - group.block));
  if (from >= to) return group;
  group.next = from * a.inner_width;
  // The line's last block may stick out; what it stores there is no element.
  const int beyond = (a.index[group.block + to - 1] + 1) * a.inner_width - a.inner_features;
  group.end = to * a.inner_width - max(beyond, 0);
  return group;
}

// Where an element of a group lies: the block's place in the pattern, and along the inner
// dimension.
struct Element {
  int block, l;
  unsigned feature;
};

__device__ inline Element element(const Lines& a, const Group& group, int at) {
  const int block = group.block + at / a.inner_width, l = at % a.inner_width;
  return {block, l, static_cast<unsigned>(a.index[block] * a.inner_width + l)};
}

// The next feature that a group needs.
__device__ inline unsigned next_feature(const Lines& a, const Group& group) {
  return group.next < group.end ? element(a, group, group.next).feature : kNone;
}

// What lane `r` of the warp knows.
__device__ inline Group group_of_lane(const Group& group, int r) {
  return {__shfl_sync(kAllLanes, group.line, r), __shfl_sync(kAllLanes, group.j, r),
          __shfl_sync(kAllLanes, group.block, r), __shfl_sync(kAllLanes, group.next, r),
          __shfl_sync(kAllLanes, group.end, r)};
}

// Calls f(element) in lane i with the group's i-th element to come, if it lies in the chunk of
// features; how many do.
template <typename F>
__device__ int for_elements(const Lines& a, const Group& group, unsigned chunk, unsigned size,
                            F&& f) {
  const int at = group.next + static_cast<int>(threadIdx.x % 32);
  bool here = at < group.end;
  if (here) {
    const Element e = element(a, group, at);
    here = e.feature - chunk < size;
    if (here) f(e);
  }
  return __popc(__ballot_sync(kAllLanes, here));
}

// The least that any thread of the block brings, told to all. Orders as __syncthreads() does;
// callers meet at another barrier before they call again.
__device__ inline unsigned block_min(unsigned value, unsigned (&slots)[kWarps]) {
  value = __reduce_min_sync(kAllLanes, value);
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_min_sync(kAllLanes, slots[threadIdx.x % kWarps]);
}

}  // namespace
}  // namespace secateur::block_sparse::CUDA::simt
