#pragma once
// Block-sparse products in bfloat16 and half on tensor cores (mma.sync m16n8k16, sums in fp32).
//
// A line is a block row, for dX a block column; its live blocks side by side, wherever they lie in
// the grid, are its strip. All three products are tiles of 128 rows by the features of a line:
//   Forward         Y = X W^T     rows of the batch, summed along the strip, of which X (dY) is
//   InputGradient   dX = dY W     gathered by 16 bytes: blocks of 8 meet two by two in one mma
//   WeightGradient  dW = dY^T X   features of the strip, summed along the batch: smaller blocks
//                                 share what is loaded of dY
// Data movement: cp.async from L2 to a ring of four stages in shared memory, 16 bytes at a time and
// permuted so that ldmatrix meets every bank once. Sums stay in registers, pass through shared
// memory to become whole rows, and are written once, by 16 bytes. What lies outside of the matrices
// is neither read nor let through: copies put zeros in its place on both sides, as zero times NaN
// would be NaN. Operands that are not aligned are copied first, 2 bytes at a time.
//
// Bound: a tile of 128 x b does 128 b / (128 + b) FLOP for each byte that it loads: 64, 43, 26, 14
// and 7.5 for b = 128, 64, 32, 16 and 8. At 5.5 TB/s, as an H100's L2 may give,
// that is 350, 235, 140, 78 and 41 TFLOP/s, all below what its mma.sync can do. Shared memory is no
// narrower: warp tiles of 64 x 64, 64 x 32 and 32 x b do 32, 21 and 32 b / (32 + b) FLOP for each
// byte they read, and a multiprocessor reads 128 bytes a clock of it where L2 gives it some 25.
// Four warps a thread block. Of these an A100's multiprocessor holds 2, 3, 4, 4 and 4, and that
// many a queue is given on any GPU. Three stages of each are on their way: some 100 KB and more,
// where 20 KB hide a latency of 800 clocks. They just fit: 164 KB, with 1 KB that the system takes
// of each.
//
// Balance: a line that is longer than its share of the machine is cut into pieces, whose sums a
// second kernel adds up in order. That takes the number of live blocks, which the host knows, and
// ptr, which never leaves the device. Where not all tiles run at once, thread blocks stay and take
// one after the other from a queue, long pieces first, or a long one that comes late would keep the
// machine waiting (tests/test_roofline.py plays both). Tiles of dW are all of one length: the
// hardware gives them out. The thread blocks beside one on a multiprocessor hide how its ring
// fills.
#include <limits>

#include "block_sparse/block_sparse.h"
#include "common/activation.h"
#include "common/kernels.cuh"
#include "common/mma.cuh"

namespace secateur::block_sparse::CUDA::tensor_cores {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 128;              // of a tile
constexpr int kDepth = 32;              // of a stage
constexpr int kStages = 4;              // of the ring
constexpr int kChunk = kLoadBytes / 2;  // elements
constexpr int kGroup = 8;               // tiles of the batch that take turns at each line
constexpr int kMinPiece = 1024;         // features: a shorter piece saves less than its sums cost
constexpr int kMinPart = 512;           // rows of the batch, likewise for dW
constexpr int kShared = 160 << 10;      // bytes of the rings on a multiprocessor, of an A100
constexpr int kPasses = 32;             // of the queue: a lane each
constexpr int kScheduling = 512;        // threads that fill it

// Neighbouring blocks of a line: [begin, end).
struct Piece {
  int line, begin, end;
  int number, count;  // of the pieces of its line
  int slot;           // for its sums; consecutive ones for the pieces of a line
};

// Tiles that thread blocks take one after the other: pass by pass, of the longest pieces first. The
// lengths of a pass have as many bits, so that two of them differ by less than a factor of two.
struct Queue {
  int taken;          // tiles
  int ends[kPasses];  // of the passes, in pieces
};

// A product as its kernels see it.
struct Work {
  // Line l has blocks [ptr[l], ptr[l + 1]). Block q lies at index[q] along the strip's side of the
  // matrix, is block position[q] of the values (null: q), and that belongs to line_of[position[q]].
  const int32_t *ptr, *index, *position, *line_of;
  int lines, width;  // of so many features each
  int inner;         // features of a block along the strip
  int step;          // blocks that a stage goes on by: several of less than its depth
  int line_features, strip_features;
  int batch;
  const void* gathered;  // X, for dX dY: (batch, strip_features), strides in elements
  int64_t gathered_stride;
  const void* dense;  // of dW, dY: (batch, line_features)
  int64_t dense_stride;
  const void *values, *bias;  // bias may be null
  Activation activation;
  void* out;
  // A line of more than `longest` blocks is cut into pieces. Beside the first ones of their lines
  // there are at most `cuts`: one for every `longest` blocks of all lines.
  int longest, cuts;
  int parts;           // of the batch, each
  int rows_of_a_part;  // so many rows: of one tile, but for dW
  float* sums;         // tiles that are yet to be added up
  int thread_blocks;
  Queue* queue;   // null: every tile has a thread block
  Piece* pieces;  // of the queue

  __host__ __device__ int items() const { return lines + cuts; }
};

// ---------------------------------------------------------------- shared memory

// A row-major tile of kCols columns, of which chunks are permuted within rows: the same chunk of
// neighbouring rows lies in different banks, for as many rows as 128 bytes hold chunks.
template <typename E, int kCols>
struct Permuted {
  static constexpr int kLine = 128 / static_cast<int>(sizeof(E)) / kChunk;  // chunks
  static constexpr int kChunks = kCols / kChunk;
  static constexpr int kPeriod = kChunks < kLine ? kChunks : kLine;
  static constexpr int kRowsOfALine = kLine / kPeriod;

  static constexpr int offset(int row, int chunk) {
    return row * kCols + (chunk ^ row / kRowsOfALine % kPeriod) * kChunk;
  }

  static constexpr bool meets_every_bank() {
    for (int first = 0; first < 4 * kLine; first += kLine)
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        unsigned met = 0;
        for (int row = first; row < first + kLine; ++row)
          met |= 1u << offset(row, chunk) / kChunk % kLine;
        if (met != (1u << kLine) - 1) return false;
      }
    return true;
  }
};

// One operand of a tile's product, a stage of it: kLength rows, kDepth deep. Transposed it lies in
// memory with `depth` as its rows.
template <typename T, int kLength, bool kLeft, bool kTransposed>
struct Operand {
  using Layout = Permuted<T, kTransposed ? kLength : kDepth>;
  static_assert(Layout::meets_every_bank());
  static constexpr int kElements = kLength * kDepth;

  // Where the chunk that starts at (row, depth) lies; it runs along depth, transposed along rows.
  static constexpr int offset(int row, int depth) {
    return kTransposed ? Layout::offset(depth, row / kChunk) : Layout::offset(row, depth / kChunk);
  }

  // kCount matrices of 8 x 8 from (row, depth) on in the order in which mma takes them: the second
  // one follows the first along the rows of the left operand, along the depth of the right one.
  template <int kCount>
  __device__ static void load(uint32_t (&to)[kCount], const T* tile, int row, int depth) {
    const int lane = threadIdx.x % 32, matrix = lane / 8 % kCount, line = lane % 8;
    row += 8 * (kLeft ? matrix % 2 : matrix / 2);
    depth += 8 * (kLeft ? matrix / 2 : matrix % 2);
    (kTransposed ? depth : row) += line;
    load_matrices<kTransposed>(to, tile + offset(row, depth));
  }
};

constexpr int ring_bytes(int width) { return kStages * (kRows + width) * kDepth * 2; }

// How the warps of a block share its tile of kRows x N.
template <int N>
struct Tile {
  static constexpr int kWarpRows = N >= 64 ? 64 : 32;
  static constexpr int kWarpCols = N == 128 ? 64 : N == 64 ? 32 : N;
  static constexpr int kWarpsAlongRows = kRows / kWarpRows;
  static constexpr int kStage = (kRows + N) * kDepth;    // elements
  using Sums = float[kWarpRows / 16][kWarpCols / 8][4];  // of a lane, as mma has them

  static_assert(kWarpsAlongRows * (N / kWarpCols) == kWarps);
  static_assert(kWarpRows % 16 == 0 && (kWarpCols % 16 == 0 || kWarpCols == 8));
  static_assert(kRows * N * 4 <= ring_bytes(N), "results take the place of the ring");
  static_assert(ring_bytes(N) <= 99 << 10);
};

// ---------------------------------------------------------------- who does what

// Items are the second and further pieces of lines, and then the first ones. Every longest-th block
// brings a further piece to the line it is in; where that line is too short to need it: false.
__device__ bool find(const Work& w, int item, Piece& piece) {
  const bool first = item >= w.cuts;
  if (first) {
    piece.line = item - w.cuts;
  } else {
    const int block = (item + 1) * w.longest - 1;
    piece.line = w.line_of[w.position ? w.position[block] : block];
  }
  const int begin = w.ptr[piece.line], length = w.ptr[piece.line + 1] - begin;
  const int cut = begin / w.longest;
  piece.number = first ? 0 : item + 1 - cut;
  piece.count = length > w.longest ? (length + w.longest - 1) / w.longest : 1;
  piece.begin = begin + static_cast<int>(int64_t{length} * piece.number / piece.count);
  piece.end = begin + static_cast<int>(int64_t{length} * (piece.number + 1) / piece.count);
  piece.slot = 2 * cut + piece.number;
  return piece.number < piece.count;
}

__device__ int pass_of(const Piece& piece) {
  const int length = piece.end - piece.begin;
  return length > 0 ? __clz(length) - 1 : kPasses - 1;
}

// Fills the queue. One thread block, whose atomics leave the order within a pass open; results do
// not depend on it.
__global__ void __launch_bounds__(kScheduling) schedule_kernel(const __grid_constant__ Work w) {
  SECATEUR_SHARED(int, places, kPasses);
  const int thread = static_cast<int>(threadIdx.x);
  const auto for_pieces = [&](auto&& f) {
    Piece piece;
    for (int item = thread; item < w.items(); item += kScheduling)
      if (find(w, item, piece)) f(piece);
  };
  if (thread < kPasses) places[thread] = 0;
  __syncthreads();
  for_pieces([&](const Piece& piece) { atomicAdd(&places[pass_of(piece)], 1); });
  __syncthreads();
  if (thread < kPasses) {
    const int count = places[thread];
    int end = count;
    for (int step = 1; step < kPasses; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, step);
      if (thread >= step) end += before;
    }
    places[thread] = end - count;
    w.queue->ends[thread] = end;
    if (thread == 0) w.queue->taken = 0;
  }
  __syncthreads();
  for_pieces([&](const Piece& piece) { w.pieces[atomicAdd(&places[pass_of(piece)], 1)] = piece; });
}

// A tile of the pieces of a pass, all of them for a group of the parts of the batch and then for
// the next: L2 is to hold what a group needs of X (dY), as every line reads it again.
struct Turn {
  int piece, part;

  __device__ Turn(const Work& w, int tile, int pieces) {
    const int group = tile / (kGroup * pieces), at = tile % (kGroup * pieces);
    const int rest = w.parts - group * kGroup, size = rest < kGroup ? rest : kGroup;
    piece = at / size;
    part = group * kGroup + at % size;
  }
};

// A tile of the queue; false beyond the last one. Called by whole warps.
__device__ bool dequeue(const Work& w, int tile, Piece& piece, int& part) {
  const int end = w.queue->ends[threadIdx.x % kPasses];
  const unsigned over = __ballot_sync(kAllLanes, end * w.parts <= tile);
  if (over == kAllLanes) return false;
  const int pass = __popc(over);
  const int last = __shfl_sync(kAllLanes, end, pass);
  const int first = pass > 0 ? __shfl_sync(kAllLanes, end, pass - 1) : 0;
  const Turn turn(w, tile - first * w.parts, last - first);
  piece = w.pieces[first + turn.piece];
  part = turn.part;
  return true;
}

// Rows [row, row + rows) of the batch.
struct Part {
  int row, rows;
};

__device__ Part part_of(const Work& w, int number) {
  const int row = number * w.rows_of_a_part, rest = w.batch - row;
  return {row, rest < w.rows_of_a_part ? rest : w.rows_of_a_part};
}

// ---------------------------------------------------------------- products

// How many bytes of a chunk are within a matrix of which `rest` elements follow.
__device__ int bytes_within(int rest) {
  return rest >= kChunk ? kLoadBytes : rest > 0 ? 2 * rest : 0;
}

// Walks along a strip, a stage at a time; reads the pattern one stage ahead.
struct Walk {
  int block, end, offset;  // in the block
  int index = 0, position = 0;

  __device__ Walk(const Work& w, const Piece& piece, int at)
      : block(piece.begin + at / w.inner), end(piece.end), offset(at % w.inner) {
    look_up(w);
  }

  __device__ void advance(const Work& w) {
    offset += kDepth;
    if (offset < w.inner) return;
    offset -= w.step * w.inner;
    block += w.step;
    look_up(w);
  }

  __device__ int feature(const Work& w) const { return index * w.inner + offset; }
  // How many features of the matrix follow, its own included; 0 beyond the piece.
  __device__ int rest(const Work& w) const {
    return block < end ? w.strip_features - feature(w) : 0;
  }

 private:
  __device__ void look_up(const Work& w) {
    if (block >= end) return;
    index = w.index[block];
    position = w.position ? w.position[block] : block;
  }
};

// Products are classes that say how both operands lie in shared memory and how deep the sums are,
// and that fetch one stage after the other.

// X, or dY for dX: a thread copies the same chunk of every kStep-th row.
template <typename T>
class Gathered {
 public:
  using Left = Operand<T, kRows, true, false>;
  static constexpr bool kSumsBatch = false;

  __device__ Gathered(const Work& w, const Piece& piece, const Part& part)
      : w_(w),
        row_(threadIdx.x / kChunks),
        at_(threadIdx.x % kChunks * kChunk),
        walk_(w, piece, at_),
        from_(static_cast<const T*>(w.gathered) + (part.row + row_) * w.gathered_stride),
        rows_(part.rows),
        depth_((piece.end - piece.begin) * w.inner) {}

  __device__ int depth() const { return depth_; }

 protected:
  static constexpr int kChunks = kDepth / kChunk;
  static constexpr int kStep = kThreads / kChunks;

  __device__ void fetch_left(T* to) {
    const int bytes = bytes_within(walk_.rest(w_));
    const T* const from = from_ + walk_.feature(w_);
#pragma unroll
    for (int i = 0; i < kRows; i += kStep)
      copy_async(to + Left::offset(row_ + i, at_), from + i * w_.gathered_stride,
                 row_ + i < rows_ ? bytes : 0);
    walk_.advance(w_);
  }

  const Work& w_;
  const int row_, at_;  // of a thread's first chunk; along the stage's depth
  Walk walk_;
  const T* const from_;
  const int rows_, depth_;
};

template <typename T, int N>
class Forward : public Gathered<T> {
 public:
  using Right = Operand<T, N, false, false>;

  __device__ Forward(const Work& w, const Piece& piece, const Part& part)
      : Gathered<T>(w, piece, part), features_(w.line_features - piece.line * N) {}

  __device__ void fetch(T* left, T* right) {
    const int bytes = bytes_within(walk_.rest(w_));
    const T* const from = static_cast<const T*>(w_.values) +
                          (int64_t{walk_.position} * N + row_) * w_.inner + walk_.offset;
    if (N >= kStep || row_ < N)
#pragma unroll
      for (int i = 0; i < N; i += kStep)
        copy_async(right + Right::offset(row_ + i, at_), from + i * w_.inner,
                   row_ + i < features_ ? bytes : 0);
    this->fetch_left(left);
  }

 private:
  using Base = Gathered<T>;
  using Base::at_, Base::kStep, Base::row_, Base::w_, Base::walk_;
  const int features_;  // of the line, within the matrix
};

// What are rows of the blocks here is the strip's depth: a thread copies chunks of one row.
template <typename T, int N>
class InputGradient : public Gathered<T> {
 public:
  using Right = Operand<T, N, false, true>;

  __device__ InputGradient(const Work& w, const Piece& piece, const Part& part)
      : Gathered<T>(w, piece, part),
        depth_(threadIdx.x / kThreadsOfARow),
        walk_(w, piece, depth_),
        features_(w.line_features - piece.line * N) {}

  __device__ void fetch(T* left, T* right) {
    this->fetch_left(left);
    if (N < 32 && depth_ >= kDepth) return;
    const bool inside = walk_.rest(w_) > 0;
    const T* const from =
        static_cast<const T*>(w_.values) + (int64_t{walk_.position} * w_.inner + walk_.offset) * N;
#pragma unroll
    for (int i = 0; i < N; i += kThreadsOfARow * kChunk) {
      // Threads that write at once have two rows, and chunks of both halves of the banks.
      const int swap = N >= 64 ? depth_ % 2 * kThreadsOfARow * kChunk : 0;
      const int at = threadIdx.x % kThreadsOfARow * kChunk + (i ^ swap);
      copy_async(right + Right::offset(at, depth_), from + at,
                 inside ? bytes_within(features_ - at) : 0);
    }
    walk_.advance(w_);
  }

 private:
  static constexpr int kThreadsOfARow = N < 32 ? N / kChunk : 4;
  using Gathered<T>::w_;
  const int depth_;  // in a stage
  Walk walk_;
  const int features_;
};

// Both operands are columns of a matrix: a thread copies the same chunk of every kStep-th row.
template <typename T, int N>
class WeightGradient {
 public:
  using Left = Operand<T, kRows, true, true>;
  using Right = Operand<T, N, false, true>;
  static constexpr bool kSumsBatch = true;

  __device__ WeightGradient(const Work& w, const Piece& piece, const Part& part)
      : w_(w), rows_(part.rows), rest_(part.rows) {
    const Walk walk(w, piece, at<kRows>());
    gathered_bytes_ = bytes_within(walk.rest(w));
    gathered_ = static_cast<const T*>(w.gathered) +
                (part.row + depth<kRows>()) * w.gathered_stride + walk.feature(w);
    const int feature = piece.line * N + at<N>();
    dense_bytes_ = bytes_within(w.line_features - feature);
    dense_ = static_cast<const T*>(w.dense) + (part.row + depth<N>()) * w.dense_stride + feature;
  }

  __device__ int depth() const { return rows_; }

  __device__ void fetch(T* left, T* right) {
    fetch<Left, kRows>(left, gathered_, w_.gathered_stride, gathered_bytes_);
    fetch<Right, N>(right, dense_, w_.dense_stride, dense_bytes_);
    rest_ -= kDepth;
  }

 private:
  template <int kLength>
  __device__ static int at() {
    return threadIdx.x % (kLength / kChunk) * kChunk;
  }
  template <int kLength>
  __device__ static int depth() {
    return threadIdx.x / (kLength / kChunk);
  }

  template <typename O, int kLength>
  __device__ void fetch(T* to, const T*& from, int64_t stride, int bytes) const {
    constexpr int kStep = kThreads / (kLength / kChunk);
    const int first = depth<kLength>();
    if (kStep <= kDepth || first < kDepth)
#pragma unroll
      for (int i = 0; i < kDepth; i += kStep)
        copy_async(to + O::offset(at<kLength>(), first + i), from + i * stride,
                   first + i < rest_ ? bytes : 0);
    from += kDepth * stride;
  }

  const Work& w_;
  const int rows_;
  int rest_;  // of the rows
  const T *gathered_, *dense_;
  int gathered_bytes_, dense_bytes_;
};

// ---------------------------------------------------------------- results

// One chunk of results: a row of the batch, or for dW of blocks, from element `col` of the tile on.
template <typename T, bool kSumsBatch>
__device__ void write(const Work& w, const Piece& piece, const Part& part, int row, int col,
                      float (&v)[kChunk]) {
  T* to = static_cast<T*>(w.out);
  int count = kChunk;
  if constexpr (kSumsBatch) {
    const int block = piece.begin + col / w.inner, offset = col % w.inner;
    if (block >= piece.end) return;
    to += (int64_t{block} * w.width + row) * w.inner + offset;
    const int rest = piece.line * w.width + row < w.line_features
                         ? w.strip_features - (w.index[block] * w.inner + offset)
                         : 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i >= rest) v[i] = 0;  // beyond the edge, whatever the other factor is
  } else {
    const int feature = piece.line * w.width + col;
    count = w.line_features - feature;
    if (row >= part.rows || count <= 0) return;
    to += int64_t{part.row + row} * w.line_features + feature;
    const T* const bias = static_cast<const T*>(w.bias);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (bias && i < count) v[i] += widen(bias[feature + i]);
      if (w.activation == Activation::Relu) v[i] = relu(v[i]);
      if (w.activation == Activation::Gelu) v[i] = gelu(v[i]);
    }
  }
  const uint4 pairs{narrow_pair<T>(v[0], v[1]), narrow_pair<T>(v[2], v[3]),
                    narrow_pair<T>(v[4], v[5]), narrow_pair<T>(v[6], v[7])};
  if (count >= kChunk && reinterpret_cast<uintptr_t>(to) % kLoadBytes == 0) {
    *reinterpret_cast<uint4*>(to) = pairs;
  } else {
    const uint32_t words[] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < count) to[i].bits = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
  }
}

// ---------------------------------------------------------------- kernels

// Where the tile of a warp begins in that of its block.
template <int N>
struct WarpTile {
  const int row = threadIdx.x / 32 % Tile<N>::kWarpsAlongRows * Tile<N>::kWarpRows;
  const int col = threadIdx.x / 32 / Tile<N>::kWarpsAlongRows * Tile<N>::kWarpCols;
};

template <typename T, typename P, int N>
__device__ void multiply_stage(const T* stage, typename Tile<N>::Sums& sums) {
  constexpr int kWarpRows = Tile<N>::kWarpRows, kWarpCols = Tile<N>::kWarpCols;
  constexpr int kAtOnce = kWarpCols == 8 ? 1 : 2;  // right matrices of 16 x 8
  const WarpTile<N> at;
  const T* const right = stage + P::Left::kElements;
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += 16) {
    uint32_t a[kWarpRows / 16][4];
#pragma unroll
    for (int r = 0; r < kWarpRows / 16; ++r) P::Left::load(a[r], stage, at.row + 16 * r, depth);
#pragma unroll
    for (int c = 0; c < kWarpCols / 8; c += kAtOnce) {
      uint32_t b[2 * kAtOnce];
      P::Right::load(b, right, at.col + 8 * c, depth);
#pragma unroll
      for (int r = 0; r < kWarpRows / 16; ++r)
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          multiply_accumulate<T>(sums[r][c + j], a[r], {b[2 * j], b[2 * j + 1]});
    }
  }
}

// A tile in shared memory as it lies in the result: dW has the features of the line as its rows.
template <typename P, int N>
using Results = Permuted<float, P::kSumsBatch ? kRows : N>;

template <typename P, int N>
__device__ void arrange(const typename Tile<N>::Sums& sums, float* results) {
  using Layout = Results<P, N>;
  static_assert(Layout::meets_every_bank());
  const WarpTile<N> at;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < Tile<N>::kWarpRows / 8; ++r)
#pragma unroll
    for (int c = 0; c < Tile<N>::kWarpCols / 8; ++c) {
      const int row = at.row + 8 * r + lane / 4, col = at.col + 8 * c + lane % 4 * 2;
      const float first = sums[r / 2][c][r % 2 * 2], second = sums[r / 2][c][r % 2 * 2 + 1];
      if constexpr (P::kSumsBatch) {
        results[Layout::offset(col, row / kChunk) + row % kChunk] = first;
        results[Layout::offset(col + 1, row / kChunk) + row % kChunk] = second;
      } else {
        float* const to = results + Layout::offset(row, col / kChunk) + col % kChunk;
        *reinterpret_cast<float2*>(to) = {first, second};
      }
    }
}

// A tile, to the result or, if others are to be added to it, to place `slot` of the sums.
template <typename T, typename P, int N>
__device__ void multiply_tile(const Work& w, const Piece& piece, const Part& part, bool whole,
                              int64_t slot, T* ring) {
  P product(w, piece, part);
  const int stages = (product.depth() + kDepth - 1) / kDepth;
  const auto stage = [&](int i) { return ring + i % kStages * Tile<N>::kStage; };
  // Every stage is a group of copies, beyond the last one an empty group.
  const auto fetch = [&](int i) {
    if (i < stages) product.fetch(stage(i), stage(i) + P::Left::kElements);
    commit_copies();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  typename Tile<N>::Sums sums = {};
  for (int i = 0; i < stages; ++i) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // stage i is there, and nobody reads the one before any more
    fetch(i + kStages - 1);
    multiply_stage<T, P, N>(stage(i), sums);
  }
  wait_for_copies<0>();
  __syncthreads();

  float* const results = reinterpret_cast<float*>(ring);
  arrange<P, N>(sums, results);
  __syncthreads();
  float4* const to = reinterpret_cast<float4*>(w.sums) + slot * (kRows * N / 4);
  constexpr int kCols = P::kSumsBatch ? kRows : N;
  for (int i = threadIdx.x; i < kRows * N / kChunk; i += kThreads) {
    const int row = i * kChunk / kCols, col = i * kChunk % kCols;
    const float* const from = results + Results<P, N>::offset(row, col / kChunk);
    const float4 low = reinterpret_cast<const float4*>(from)[0];
    const float4 high = reinterpret_cast<const float4*>(from)[1];
    if (whole) {
      float v[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      write<T, P::kSumsBatch>(w, piece, part, row, col, v);
    } else {
      to[2 * i] = low;
      to[2 * i + 1] = high;
    }
  }
}

template <typename T, template <typename, int> typename Product, int N>
__global__ void __launch_bounds__(kThreads) multiply_kernel(const __grid_constant__ Work w) {
  using P = Product<T, N>;
  SECATEUR_DYNAMIC_SHARED(T, ring);
  const int block = static_cast<int>(blockIdx.x), items = w.items();
  Piece piece;
  if constexpr (P::kSumsBatch) {
    const int item = block % items, number = block / items;
    if (find(w, item, piece) && piece.begin < piece.end)
      multiply_tile<T, P, N>(w, piece, part_of(w, number), w.parts == 1,
                             int64_t{number} * items + item, ring);
  } else {
    do {
      int number;  // of the part
      if (w.queue) {
        int* const next = reinterpret_cast<int*>(ring);
        if (threadIdx.x == 0) *next = atomicAdd(&w.queue->taken, 1);
        __syncthreads();
        const int tile = *next;
        __syncthreads();  // copies may take its place
        if (!dequeue(w, tile, piece, number)) return;
      } else {
        const Turn turn(w, block, items);
        if (!find(w, turn.piece, piece)) return;
        number = turn.part;
      }
      multiply_tile<T, P, N>(w, piece, part_of(w, number), piece.count == 1,
                             int64_t{piece.slot} * w.parts + number, ring);
      __syncthreads();  // the ring is free again
    } while (w.queue);
  }
}

// Adds up the sums of the pieces of a line, for dW those of the parts of the batch, in order. A
// thread takes one chunk of a tile.
template <typename T, bool kSumsBatch>
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ Work w) {
  const int block = static_cast<int>(blockIdx.x);
  const int item = kSumsBatch ? block : block / w.parts;
  const int number = kSumsBatch ? 0 : block % w.parts;
  Piece piece;
  if (!find(w, item, piece)) return;
  if (kSumsBatch ? piece.begin == piece.end : piece.number != 1) return;  // one for all of a line
  const int count = kSumsBatch ? w.parts : piece.count;
  const int64_t first = kSumsBatch ? item : int64_t{piece.slot - 1} * w.parts + number;
  const int64_t step = kSumsBatch ? w.items() : w.parts;

  const int chunks = kRows * w.width / kChunk, cols = kSumsBatch ? kRows : w.width;
  const int i = blockIdx.y * kThreads + threadIdx.x;
  const float4* from = reinterpret_cast<const float4*>(w.sums) + 2 * (first * chunks + i);
  float v[kChunk] = {};
  for (int k = 0; k < count; ++k, from += 2 * step * chunks) {
    const float4 low = from[0], high = from[1];
    const float more[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[j] += more[j];
  }
  write<T, kSumsBatch>(w, piece, part_of(w, number), i * kChunk / cols, i * kChunk % cols, v);
}

// Rows of a matrix to where each begins at a multiple of 16 bytes; what lies between is not
// written.
struct Copy {
  const uint16_t* from;
  int64_t stride, rows, cols;
  uint16_t* to;
  int64_t pitch;
};

__global__ void __launch_bounds__(kThreads) align_kernel(const __grid_constant__ Copy c) {
  const int64_t chunks = c.pitch / kChunk, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < c.rows * chunks; i += step) {
    const int64_t row = i / chunks, col = i % chunks * kChunk;
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (col + j < c.cols) c.to[row * c.pitch + col + j] = c.from[row * c.stride + col + j];
  }
}

// ---------------------------------------------------------------- launches

bool is_width(int64_t n) { return n == 8 || n == 16 || n == 32 || n == 64 || n == 128; }

int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Hands out parts of a workspace; with none it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  void* take(int64_t bytes) {
    void* const taken = memory_ ? memory_ + used_ : nullptr;
    used_ += ceil_div(bytes, kLoadBytes) * kLoadBytes;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

struct Plan {
  Work work;
  Copy copies[2];  // of operands that are not aligned
  int count = 0;

  // Puts an aligned copy in the place of an operand that is not.
  void align(const void*& data, int64_t& stride, int64_t rows, int64_t cols, Workspace& space) {
    if (aligned(data) && stride % kChunk == 0) return;
    const int64_t pitch = ceil_div(cols, kChunk) * kChunk;
    void* const to = space.take(rows * pitch * 2);
    copies[count++] = {static_cast<const uint16_t*>(data), stride, rows, cols,
                       static_cast<uint16_t*>(to),         pitch};
    data = to;
    stride = pitch;
  }
};

Plan plan_of(const Problem& p, Workspace& space) {
  const bool by_columns = p.product == Product::InputGradient;
  const bool sums_batch = p.product == Product::WeightGradient;
  Plan plan{};
  Work& w = plan.work;
  w.ptr = by_columns ? p.col_ptr : p.row_ptr;
  w.index = by_columns ? p.row_t : p.col;
  w.position = by_columns ? p.position_t : nullptr;
  w.line_of = by_columns ? p.col : p.row_of;
  w.lines = static_cast<int>(by_columns ? p.block_cols : p.block_rows);
  w.width = static_cast<int>(by_columns ? p.cols : p.rows);
  w.inner = static_cast<int>(by_columns ? p.rows : p.cols);
  w.step = w.inner < kDepth ? kDepth / w.inner : 1;
  w.line_features = static_cast<int>(by_columns ? p.in_features : p.out_features);
  w.strip_features = static_cast<int>(by_columns ? p.out_features : p.in_features);
  w.batch = static_cast<int>(p.batch);
  w.gathered = by_columns ? p.dy : p.x;
  w.gathered_stride = by_columns ? p.dy_stride : p.x_stride;
  plan.align(w.gathered, w.gathered_stride, p.batch, w.strip_features, space);
  if (sums_batch) {
    w.dense = p.dy;
    w.dense_stride = p.dy_stride;
    plan.align(w.dense, w.dense_stride, p.batch, w.line_features, space);
  } else {
    int64_t stride = 0;  // a single row
    w.values = p.values;
    plan.align(w.values, stride, 1, p.n_blocks * p.rows * p.cols, space);
  }
  w.bias = p.bias;
  w.activation = p.activation;
  w.out = sums_batch ? p.dw : p.out;

  // Thread blocks that run at once.
  const int64_t share = kShared / ring_bytes(w.width) * multiprocessors();
  int64_t tiles;  // of sums
  if (sums_batch) {
    w.longest = kRows / w.inner;
    w.cuts = static_cast<int>(p.n_blocks / w.longest);
    const int64_t most = std::max<int64_t>(1, p.batch / kMinPart);
    const int64_t parts = std::clamp<int64_t>(share / w.items(), 1, most);
    w.rows_of_a_part = static_cast<int>(ceil_div(ceil_div(p.batch, parts), kDepth)) * kDepth;
    w.parts = static_cast<int>(ceil_div(p.batch, w.rows_of_a_part));
    tiles = w.parts > 1 ? int64_t{w.items()} * w.parts : 0;
  } else {
    w.rows_of_a_part = kRows;
    w.parts = static_cast<int>(ceil_div(p.batch, kRows));
    const int64_t most = std::max<int64_t>(1, ceil_div(w.strip_features, w.inner));
    const int64_t even =
        std::max(ceil_div(p.n_blocks * w.parts, share), ceil_div(kMinPiece, w.inner));
    w.longest = static_cast<int>(std::min(even, most));
    w.cuts = even < most ? static_cast<int>(p.n_blocks / even) : 0;
    tiles = int64_t{2} * w.cuts * w.parts;
  }
  w.sums = static_cast<float*>(space.take(tiles * kRows * w.width * sizeof(float)));
  w.thread_blocks = w.items() * w.parts;
  if (!sums_batch && w.thread_blocks > share) {
    w.thread_blocks = static_cast<int>(share);
    w.queue = static_cast<Queue*>(space.take(sizeof(Queue)));
    w.pieces = static_cast<Piece*>(space.take(w.items() * sizeof(Piece)));
  }
  return plan;
}

template <typename T, template <typename, int> typename Product, int N>
void launch(const Work& w, void* stream) {
  constexpr bool kSumsBatch = Product<T, N>::kSumsBatch;
  if constexpr (ring_bytes(N) > 48 << 10)
    cudaFuncSetAttribute(multiply_kernel<T, Product, N>,
                         cudaFuncAttributeMaxDynamicSharedMemorySize, ring_bytes(N));
  if (w.queue) SECATEUR_LAUNCH(schedule_kernel, 1, kScheduling, 0, stream, w);
  SECATEUR_LAUNCH((multiply_kernel<T, Product, N>), w.thread_blocks, kThreads, ring_bytes(N),
                  stream, w);
  const int sums = kSumsBatch ? w.parts > 1 ? w.items() : 0 : w.cuts * w.parts;
  if (sums > 0)
    SECATEUR_LAUNCH((add_kernel<T, kSumsBatch>), dim3(sums, kRows * N / kChunk / kThreads),
                    kThreads, 0, stream, w);
}

template <typename T, template <typename, int> typename Product>
void launch(const Work& w, void* stream) {
  switch (w.width) {
    case 8:
      return launch<T, Product, 8>(w, stream);
    case 16:
      return launch<T, Product, 16>(w, stream);
    case 32:
      return launch<T, Product, 32>(w, stream);
    case 64:
      return launch<T, Product, 64>(w, stream);
    default:
      return launch<T, Product, 128>(w, stream);
  }
}

template <typename T>
void launch(Product product, const Work& w, void* stream) {
  if (product == Product::Forward)
    launch<T, Forward>(w, stream);
  else if (product == Product::InputGradient)
    launch<T, InputGradient>(w, stream);
  else
    launch<T, WeightGradient>(w, stream);
}

// Whether the kernels here take a product: in 16 bits, of blocks that are tiles, and not so large
// that 32 bits do not count its features, rows and thread blocks.
bool takes(const Problem& p) {
  if (p.dtype != Dtype::BFloat16 && p.dtype != Dtype::Half) return false;
  if (!is_width(p.rows) || !is_width(p.cols)) return false;
  constexpr int64_t kMost = std::numeric_limits<int>::max() - kGroup * kRows;
  const int64_t items = p.n_blocks + std::max(p.block_rows, p.block_cols);
  return p.batch <= kMost && p.out_features <= kMost && p.in_features <= kMost &&
         items <= kMost / std::max<int64_t>(kGroup, ceil_div(p.batch, kRows));
}

int64_t workspace_bytes(const Problem& p) {
  Workspace none(nullptr);
  plan_of(p, none);
  return none.used();
}

// A product that takes() takes.
int run(const Problem& p, void* workspace, void* stream) {
  Workspace space(workspace);
  const Plan plan = plan_of(p, space);
  for (int i = 0; i < plan.count; ++i) {
    const Copy& copy = plan.copies[i];
    const unsigned blocks = blocks_for(ceil_div(copy.rows * copy.pitch, kThreads * kChunk));
    SECATEUR_LAUNCH(align_kernel, blocks, kThreads, 0, stream, copy);
  }
  if (p.dtype == Dtype::BFloat16)
    launch<BFloat16>(p.product, plan.work, stream);
  else
    launch<Half>(p.product, plan.work, stream);
  return cudaGetLastError();
}

}  // namespace
}  // namespace secateur::block_sparse::CUDA::tensor_cores
