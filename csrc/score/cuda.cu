// Fused scores on CUDA: one pass over weight, gradient and state, bound by reading them.
// A score of one element goes straight from registers to memory. A reduction must follow the tree
// of common/score.h, whose order down a column and along a lane leaves few additions independent,
// so threads do not own what they add up: all of a block load and score a tile, by 16-byte loads
// where tiles begin at multiples of 16 bytes, and leave it in shared memory; then some of them
// follow the tree, while the loads of the next tile are in flight.
//   blocks_kernel  blocks of at most 256 columns: tiles hold blocks side by side, and several
//                  strips of them or a part of one
//   rows_kernel    wider blocks of one row: a tile holds a part of four or eight rows
// Wider blocks of several rows take both: the columns of a strip, then those as rows.
// Tensors that want the same kernel share its launches: it takes them as a table in its parameters,
// so that a model is a few launches and nothing is copied for them. A tile is of one tensor.
#include <algorithm>
#include <bit>
#include <span>
#include <vector>

#include "common/evaluate.cuh"
#include "score/score.h"

namespace secateur::score::CUDA {
namespace {

constexpr int kUnroll = 2;     // loads of 16 bytes of every input that a thread has in flight
constexpr int kElements = 4;   // elements that it has where vectors cannot be loaded
constexpr int kMaxStrips = 8;  // of a tile in rows_kernel

// How blocks_kernel is used.
constexpr int64_t kNarrow = 32;        // columns of the narrowest tiles
constexpr int64_t kWidest = kThreads;  // of the widest: a thread each
constexpr int64_t kTall = 512;         // rows of a block that wants narrow tiles
constexpr int64_t kLarge = 1 << 14;    // elements of a block that takes one tile after the other
constexpr int64_t kFew = 256;          // blocks that leave some multiprocessors idle

template <typename S>
constexpr int kVector = kLoadBytes / sizeof(S);
template <typename S>
constexpr int kTile = kThreads * kUnroll * kVector<S>;  // elements

// How blocks are laid over tiles.
struct Tiling {
  int log_width;    // of a tile's row; what is left of kTile are its rows
  int strips;       // rows of blocks in a tile, or one of which it holds a part
  int blocks;       // blocks side by side in a tile, or one of which it holds a part
  unsigned across;  // tiles side by side, or one for every block if it holds a part
  bool enters;      // whether elements come in: not where columns do, which a first pass left
  bool leaves;      // whether scores go out: not where columns do, for a second pass
};

// Args whose inputs lie as in_vectors() wants, in short: more of them fit into a table.
struct Flat {
  struct Memory {
    void* data;
  };
  struct Inputs {
    Memory weight, grad, state;
    Formula formula;
    ScoreParams params;
  };
  Inputs inputs;
  Reduce reduce;
  int64_t n_rows, n_cols;
  int64_t rows, cols;
  void* out;

  Flat() = default;
  explicit Flat(const Args& a)
      : inputs{{a.inputs.weight.data},
               {a.inputs.grad.data},
               {a.inputs.state.data},
               a.inputs.formula,
               a.inputs.params},
        reduce(a.reduce),
        n_rows(a.n_rows),
        n_cols(a.n_cols),
        rows(a.rows),
        cols(a.cols),
        out(a.out) {}
};

using secateur::offset_of;
__device__ int64_t offset_of(const Flat::Memory&, int64_t index) { return index; }

// Tensor is Flat or Args.
template <typename Tensor>
struct Entry {
  Tensor tensor;
  Tiling tiling;  // where blocks are reduced
  int64_t first_tile;
};

template <typename Tensor>
struct Table {
  // A kernel has 4 KB of parameters, of which the rest of the table takes 16 bytes.
  static constexpr int kCapacity = (4096 - 16) / sizeof(Entry<Tensor>);
  int64_t tiles;
  int32_t count;
  Entry<Tensor> entries[kCapacity];
};

// Calls f(entry, tile of its tensor) for the tiles of a thread block.
template <typename Tensor, typename F>
__device__ void for_tiles(const Table<Tensor>& table, F&& f) {
  for (int64_t tile = blockIdx.x; tile < table.tiles; tile += gridDim.x) {
    const Entry<Tensor>& entry =
        table.entries[find<&Entry<Tensor>::first_tile>(table.entries, table.count, tile)];
    f(entry, tile - entry.first_tile);
  }
}

// Scores N elements from `index` on, and writes the new state where there is one.
template <typename A, typename T, int N>
__device__ void evaluate(const A& a, Mode mode, Operands<T, N>& x, int64_t index, T (&scored)[N]) {
  scores(a.inputs, mode, x, index, scored);
  if (mode == Mode::Update)
    store_run<true>(static_cast<T*>(a.inputs.state.data) + offset_of(a.inputs.state, index),
                    x.state);
}

template <typename A, typename T, int N>
__device__ void score_elements(const A& a, Mode mode, Operands<T, N> x, int64_t index) {
  T scored[N];
  evaluate(a, mode, x, index, scored);
  if (a.out) store_run<true>(static_cast<T*>(a.out) + index, scored);
}

// Inputs that lie as in_vectors() wants.
template <typename S, Mode M>
__global__ void __launch_bounds__(kThreads)
    elements_kernel(const __grid_constant__ Table<Flat> table) {
  for_tiles(table, [](const Entry<Flat>& entry, int64_t tile) {
    const Flat& a = entry.tensor;
    constexpr int n = kVector<S>;
    const int64_t numel = a.n_rows * a.n_cols, whole = numel / n;
    const int64_t first = tile * kThreads * kUnroll + threadIdx.x;
    PackedOperands<S, n> packed[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (first + k * kThreads < whole) packed[k].load(a.inputs, (first + k * kThreads) * n);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (first + k * kThreads < whole)
        score_elements(a, M, packed[k].widened(), (first + k * kThreads) * n);
    if (first < numel - whole * n)  // the elements after the last whole vector
      score_elements(a, M, load_first<S, 1>(a.inputs, whole * n + first, 1), whole * n + first);
  });
}

// Inputs of any layout, by any mode. The 2 is as kMinBlocks of Elements.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    strided_kernel(const __grid_constant__ Table<Args> table) {
  for_tiles(table, [](const Entry<Args>& entry, int64_t tile) {
    const Args& a = entry.tensor;
    const int64_t numel = a.n_rows * a.n_cols;
    const int64_t first = tile * kThreads * kElements + threadIdx.x;
    Operands<T, 1> x[kElements];
#pragma unroll
    for (int k = 0; k < kElements; ++k)
      if (first + k * kThreads < numel) x[k] = load_one<T>(a.inputs, first + k * kThreads);
#pragma unroll
    for (int k = 0; k < kElements; ++k)
      if (first + k * kThreads < numel) score_elements(a, a.mode, x[k], first + k * kThreads);
  });
}

// The part of a matrix that a tile holds; none with no rows or columns.
struct Part {
  int64_t first;  // index of its first element
  int rows, cols;
};

// Stores neighbouring threads' runs in shared memory. Runs of two vectors: lanes 4 to 7 of every
// eight, which store at the same time, begin with the second, or they would meet lanes 0 to 3 in
// the same banks.
template <typename T, int N>
__device__ void store_shared(T* to, const T (&x)[N]) {
  constexpr int half = N / 2;
  if constexpr (N * sizeof(T) <= kLoadBytes) {
    store_run<false>(to, x);
  } else {
    static_assert(half * sizeof(T) == kLoadBytes);
    const bool swap = threadIdx.x & 4;
    T first[half], second[half];
#pragma unroll
    for (int i = 0; i < half; ++i) {
      first[i] = swap ? x[half + i] : x[i];
      second[i] = swap ? x[i] : x[half + i];
    }
    store_run<false>(to + (swap ? half : 0), first);
    store_run<false>(to + (swap ? 0 : half), second);
  }
}

// Leaves in shared memory what N elements from `index` on bring into a reduction.
template <typename A, typename T, int N>
__device__ void deliver(const A& a, Mode mode, Operands<T, N> x, int64_t index, bool enters,
                        T* to) {
  T scored[N];
  evaluate(a, mode, x, index, scored);
  if (enters && a.reduce == Reduce::L2) {
#pragma unroll
    for (int i = 0; i < N; ++i) scored[i] = enter<Reduce::L2>(scored[i]);
  }
  store_shared(to, scored);
}

// Fills tiles from inputs that lie as in_vectors() wants.
template <typename S, Mode M>
class Vectors {
 public:
  using Stored = S;
  using Tensor = Flat;
  // Thread blocks of blocks_kernel on a multiprocessor at once, so that one loads while another
  // adds; ptxas would spill registers for more.
  static constexpr int kMinBlocks = M == Mode::Update || sizeof(S) == 8 ? 2 : 3;

  // Asks for the inputs of a part.
  __device__ void request(const Flat& a, const Tiling& t, const Part& part) {
    each(t, part, [&](int k, int row, int col) {
      packed_[k].load(a.inputs, part.first + row * a.n_cols + col);
    });
  }

  // Leaves the part that was requested last in a tile, whose rows are `stride` apart.
  __device__ void fill(const Flat& a, const Tiling& t, const Part& part, int stride,
                       Compute<S>* tile) {
    each(t, part, [&](int k, int row, int col) {
      deliver(a, M, packed_[k].widened(), part.first + row * a.n_cols + col, t.enters,
              tile + row * stride + col);
    });
  }

 private:
  template <typename F>
  __device__ void each(const Tiling& t, const Part& part, F&& f) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = (k * kThreads + static_cast<int>(threadIdx.x)) * kVector<S>;
      const int row = i >> t.log_width, col = i & ((1 << t.log_width) - 1);
      if (row < part.rows && col < part.cols) f(k, row, col);
    }
  }

  PackedOperands<S, kVector<S>> packed_[kUnroll];
};

// The same from inputs of any layout, element by element, by any mode.
template <typename T>
struct Elements {
  using Stored = T;
  using Tensor = Args;
  static constexpr int kMinBlocks = 2;

  __device__ void request(const Args&, const Tiling&, const Part&) {}

  __device__ void fill(const Args& a, const Tiling& t, const Part& part, int stride, T* tile) {
#pragma unroll 1
    for (int done = 0; done < kTile<T>; done += kElements * kThreads) {
      Operands<T, 1> x[kElements];
      const auto each = [&](auto&& f) {
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
          const int i = done + k * kThreads + static_cast<int>(threadIdx.x);
          const int row = i >> t.log_width, col = i & ((1 << t.log_width) - 1);
          if (row < part.rows && col < part.cols)
            f(k, part.first + row * a.n_cols + col, tile + row * stride + col);
        }
      };
      each([&](int k, int64_t index, T*) { x[k] = load_one<T>(a.inputs, index); });
      each([&](int k, int64_t index, T* to) { deliver(a, a.mode, x[k], index, t.enters, to); });
    }
  }
};

// Calls f.template operator()<R>() for an R that combines as `reduce` does: sums, means and norms
// are combined alike.
template <typename F>
__device__ void for_combine(Reduce reduce, F&& f) {
  if (reduce == Reduce::Max)
    f.template operator()<Reduce::Max>();
  else
    f.template operator()<Reduce::Sum>();
}

// The lanes of a block's reduction, halved down to one, by the first `count` lanes (a power of two)
// of every so many; those who have none bring the identity.
template <Reduce R, typename T>
__device__ T halve(T lane, int count) {
  for (int half = count / 2; half > 0; half /= 2)
    lane = combine<R>(lane, __shfl_down_sync(kAllLanes, lane, half, count));
  return lane;
}

// leave() of common/score.h.
template <typename T>
__device__ T score_of(Reduce reduce, T sum, int64_t count) {
  for_reduce(reduce, [&]<Reduce R>() { sum = leave<R>(sum, count); });
  return sum;
}

// `x`, but no more than fits.
__device__ int at_most(int limit, int64_t x) { return x < limit ? static_cast<int>(x) : limit; }

// A tile of blocks_kernel.
template <typename Loader>
__device__ void reduce_blocks(const Entry<typename Loader::Tensor>& entry, unsigned tile_index,
                              Compute<typename Loader::Stored>* tile) {
  const auto& a = entry.tensor;
  const Tiling& t = entry.tiling;
  using S = Loader::Stored;
  using T = Compute<S>;
  const int width = 1 << t.log_width, cols = static_cast<int>(a.cols);
  const int strip_rows = at_most(kTile<S> >> t.log_width, a.rows);
  const int height = t.strips * strip_rows;
  const int64_t strip = int64_t{tile_index / t.across} * t.strips;
  const int64_t col = int64_t{tile_index % t.across} * t.blocks * cols;
  int64_t rows = min(t.strips * a.rows, a.n_rows - strip * a.rows);  // to come
  const int strips = at_most(t.strips, ceil_div(rows, a.rows));
  Part part{strip * a.rows * a.n_cols + col, at_most(height, rows),
            at_most(t.blocks * cols, a.n_cols - col)};
  T carried = identity<T>(a.reduce);  // of a column that goes on in the next tile
  Loader loader;
  loader.request(a, t, part);
  while (part.rows > 0) {
    loader.fill(a, t, part, width, tile);
    const int here = part.rows;
    rows -= here;
    part.rows = at_most(height, rows);
    part.first += height * a.n_cols;
    loader.request(a, t, part);
    __syncthreads();
    if (a.rows == 1) continue;  // its own columns, and there is no other part
    for_combine(a.reduce, [&]<Reduce R>() {
      for (int i = threadIdx.x; i < strips << t.log_width; i += kThreads) {
        const int first = (i >> t.log_width) * strip_rows, c = i & (width - 1);
        if (c >= part.cols) continue;
        const int end = min(first + strip_rows, here);
        T sum = strip_rows < a.rows ? carried : identity<T>(R);
        for (int r = first; r < end; ++r) sum = combine<R>(sum, tile[(r << t.log_width) + c]);
        tile[(first << t.log_width) + c] = carried = sum;
      }
    });
    __syncthreads();
  }
  // The columns lie in the first row of each strip.
  const int blocks = (part.cols + cols - 1) / cols;
  const int log_lanes = min(32 - __clz(cols - 1), kLogReduceLanes), lanes = 1 << log_lanes;
  const int count = strips * blocks << log_lanes;
  for_combine(a.reduce, [&]<Reduce R>() {
    for (int done = 0; done < count; done += kThreads) {
      const int i = done + static_cast<int>(threadIdx.x), lane = i & (lanes - 1);
      const int s = (i >> log_lanes) / blocks, b = (i >> log_lanes) % blocks;
      const int n = min(cols, part.cols - b * cols);
      T sum = identity<T>(R);
      for (int c = lane; i < count && c < n; c += kReduceLanes)
        sum = combine<R>(sum, tile[(s * strip_rows << t.log_width) + b * cols + c]);
      sum = halve<R>(sum, lanes);
      if (i < count && lane == 0) {
        const int64_t high = min(a.rows, a.n_rows - (strip + s) * a.rows);
        static_cast<T*>(a.out)[(strip + s) * ceil_div(a.n_cols, a.cols) + col / cols + b] =
            t.leaves ? score_of(a.reduce, sum, high * n) : sum;
      }
    }
  });
}

template <typename Loader>
__global__ void __launch_bounds__(kThreads, Loader::kMinBlocks)
    blocks_kernel(const __grid_constant__ Table<typename Loader::Tensor> table) {
  using S = Loader::Stored;
  using T = Compute<S>;
  SECATEUR_SHARED(uint4, shared, kTile<S> * sizeof(T) / sizeof(uint4));
  for_tiles(table, [&](const auto& entry, int64_t tile) {
    reduce_blocks<Loader>(entry, static_cast<unsigned>(tile), reinterpret_cast<T*>(shared));
    __syncthreads();  // the next tile takes its place
  });
}

// A tile of rows_kernel. Row i of the inputs stands for the i-th strip of args.rows rows.
template <typename Loader>
__device__ void reduce_rows(const Entry<typename Loader::Tensor>& entry, unsigned tile_index,
                            Compute<typename Loader::Stored>* tile) {
  const auto& a = entry.tensor;
  const Tiling& t = entry.tiling;
  using S = Loader::Stored;
  using T = Compute<S>;
  // Rows are apart by half of the banks more than a multiple, so that two of them serve a warp.
  const int width = 1 << t.log_width, stride = width + kReduceLanes;
  const int s = threadIdx.x / kReduceLanes, lane = threadIdx.x % kReduceLanes;
  const int64_t strip = int64_t{tile_index / t.across} * t.strips;
  const int64_t col = tile_index % t.across * a.cols;
  int64_t cols = min(a.cols, a.n_cols - col);  // to come
  Part part{strip * a.n_cols + col, at_most(t.strips, ceil_div(a.n_rows, a.rows) - strip),
            at_most(width, cols)};
  T sum = identity<T>(a.reduce);
  Loader loader;
  loader.request(a, t, part);
  while (part.cols > 0) {
    loader.fill(a, t, part, stride, tile);
    const int here = part.cols;
    cols -= here;
    part.cols = at_most(width, cols);
    part.first += width;
    loader.request(a, t, part);
    __syncthreads();
    if (s < part.rows)
      for_combine(a.reduce, [&]<Reduce R>() {
        for (int c = lane; c < here; c += kReduceLanes) sum = combine<R>(sum, tile[s * stride + c]);
      });
    __syncthreads();
  }
  for_combine(a.reduce, [&]<Reduce R>() { sum = halve<R>(sum, kReduceLanes); });
  if (lane == 0 && s < part.rows) {
    const int64_t high = min(a.rows, a.n_rows - (strip + s) * a.rows);
    static_cast<T*>(a.out)[(strip + s) * t.across + tile_index % t.across] =
        score_of(a.reduce, sum, high * min(a.cols, a.n_cols - col));
  }
}

template <typename Loader>
__global__ void __launch_bounds__(kThreads, Loader::kMinBlocks)
    rows_kernel(const __grid_constant__ Table<typename Loader::Tensor> table) {
  using S = Loader::Stored;
  using T = Compute<S>;
  constexpr int size = kTile<S> + kMaxStrips * kReduceLanes;
  SECATEUR_SHARED(uint4, shared, size * sizeof(T) / sizeof(uint4));
  for_tiles(table, [&](const auto& entry, int64_t tile) {
    reduce_rows<Loader>(entry, static_cast<unsigned>(tile), reinterpret_cast<T*>(shared));
  });
}

int log2_ceil(int64_t x) { return std::bit_width(static_cast<uint64_t>(x - 1)); }

// What a pass does on one tensor: `launch` takes it, and others of the same, as tables.
struct Work {
  void (*launch)(std::span<const Work> works, void* stream);
  Args args;
  Tiling tiling;
  int64_t tiles;
};

// Calls f(table, thread blocks) for as many tables as it takes.
template <typename Tensor, typename F>
void for_tables(std::span<const Work> works, F&& f) {
  static_assert(sizeof(Table<Tensor>) <= 4096);
  Table<Tensor> table{};
  for (const Work& work : works) {
    if (table.count == Table<Tensor>::kCapacity) {
      f(table, blocks_for(table.tiles));
      table.tiles = table.count = 0;
    }
    table.entries[table.count++] = {Tensor(work.args), work.tiling, table.tiles};
    table.tiles += work.tiles;
  }
  f(table, blocks_for(table.tiles));
}

template <typename S, Mode M>
void launch_elements(std::span<const Work> works, void* stream) {
  for_tables<Flat>(works, [&](const Table<Flat>& table, unsigned blocks) {
    SECATEUR_LAUNCH((elements_kernel<S, M>), blocks, kThreads, 0, stream, table);
  });
}

template <typename T>
void launch_strided(std::span<const Work> works, void* stream) {
  for_tables<Args>(works, [&](const Table<Args>& table, unsigned blocks) {
    SECATEUR_LAUNCH(strided_kernel<T>, blocks, kThreads, 0, stream, table);
  });
}

template <typename Loader>
void launch_blocks(std::span<const Work> works, void* stream) {
  for_tables<typename Loader::Tensor>(works, [&](const auto& table, unsigned blocks) {
    SECATEUR_LAUNCH(blocks_kernel<Loader>, blocks, kThreads, 0, stream, table);
  });
}

template <typename Loader>
void launch_rows(std::span<const Work> works, void* stream) {
  for_tables<typename Loader::Tensor>(works, [&](const auto& table, unsigned blocks) {
    SECATEUR_LAUNCH(rows_kernel<Loader>, blocks, kThreads, 0, stream, table);
  });
}

// Launches a pass.
void launch(std::vector<Work>& works, void* stream) {
  for (auto first = works.begin(); first != works.end();) {
    const auto launch = first->launch;
    const auto last = std::stable_partition(
        first, works.end(), [&](const Work& work) { return work.launch == launch; });
    launch({first, last}, stream);
    first = last;
  }
}

int64_t tiles(const Args& a, const Tiling& t) {
  return ceil_div(ceil_div(a.n_rows, a.rows), t.strips) * t.across;
}

// Calls f.template operator()<Loader>() for the loader of the inputs in tiles whose columns begin
// at multiples of `cols`.
template <typename F>
void for_loader(const Args& a, int64_t cols, F&& f) {
  for_dtype(input_dtype(a.inputs, a.wide), [&]<typename S>() {
    if (in_vectors(a.inputs) && a.n_cols % kVector<S> == 0 && cols % kVector<S> == 0)
      for_mode(a.mode, [&]<Mode M>() { f.template operator()<Vectors<S, M>>(); });
    else
      f.template operator()<Elements<Compute<S>>>();
  });
}

Work elements(const Args& a) {
  Work work{nullptr, a, {}, 0};
  const int64_t numel = a.n_rows * a.n_cols;
  for_dtype(input_dtype(a.inputs, a.wide), [&]<typename S>() {
    if (in_vectors(a.inputs)) {
      for_mode(a.mode, [&]<Mode M>() { work.launch = launch_elements<S, M>; });
      work.tiles = ceil_div(numel, kTile<S>);
    } else {
      work.launch = launch_strided<Compute<S>>;
      work.tiles = ceil_div(numel, kThreads * kElements);
    }
  });
  return work;
}

Work blocks(const Args& a, bool leaves) {
  Tiling t{};
  // The tiles of tall blocks are narrow, so that there are more of them.
  t.log_width = std::min(log2_ceil(a.rows > kTall ? kNarrow : 2 * kNarrow), log2_ceil(a.n_cols));
  // Wide enough for one block, and for three quarters of them to be blocks.
  const auto filled = [&] { return (1 << t.log_width) / a.cols * a.cols; };
  while (filled() * 4 < 3 << t.log_width && filled() < a.n_cols && 1 << t.log_width < kWidest)
    ++t.log_width;
  t.blocks = static_cast<int>((1 << t.log_width) / a.cols);
  t.across = static_cast<unsigned>(ceil_div(ceil_div(a.n_cols, a.cols), t.blocks));
  t.enters = true;
  t.leaves = leaves;
  Work work{nullptr, a, t, 0};
  for_loader(a, t.blocks * a.cols, [&]<typename Loader>() {
    const int64_t height = kTile<typename Loader::Stored> >> t.log_width;
    work.launch = launch_blocks<Loader>;
    work.tiling.strips = static_cast<int>(std::max<int64_t>(1, height / a.rows));
  });
  work.tiles = tiles(a, work.tiling);
  return work;
}

Work rows(const Args& a, bool enters) {
  Work work{nullptr, a, {}, 0};
  Tiling& t = work.tiling;
  for_loader(a, a.cols, [&]<typename Loader>() {
    constexpr int size = kTile<typename Loader::Stored>;
    work.launch = launch_rows<Loader>;
    t.strips = a.cols <= size / kMaxStrips ? kMaxStrips : kMaxStrips / 2;
    t.log_width = log2_ceil(size / t.strips);
  });
  t.across = static_cast<unsigned>(ceil_div(a.n_cols, a.cols));
  t.enters = enters;
  t.leaves = true;
  work.tiles = tiles(a, t);
  return work;
}

// Whether columns are reduced first: of blocks that are wider than a tile, and of large ones that
// are too few to keep a GPU busy.
bool in_two_passes(const Args& a) {
  const bool few = ceil_div(a.n_rows, a.rows) * ceil_div(a.n_cols, a.cols) < kFew;
  const bool large = a.rows * a.cols > kLarge;
  return a.rows > 1 && a.cols > (few && large ? kNarrow : kWidest);
}

// What a first pass leaves to the second.
int64_t columns(const Args& a) { return ceil_div(a.n_rows, a.rows) * a.n_cols; }

int64_t columns_bytes(const Args& a) {
  return ceil_div(columns(a) * (a.wide ? 8 : 4), kLoadBytes) * kLoadBytes;
}

}  // namespace

int64_t workspace_bytes(const Args* tensors, int64_t count) {
  int64_t bytes = 0;
  for (const Args& a : std::span(tensors, count))
    if (in_two_passes(a)) bytes += columns_bytes(a);
  return bytes;
}

int run(const Args* tensors, int64_t count, void* workspace, void* stream) {
  std::vector<Work> first, second;
  auto* memory = static_cast<unsigned char*>(workspace);
  for (const Args& a : std::span(tensors, count)) {
    if (by_elements(a)) {
      first.push_back(elements(a));
    } else if (in_two_passes(a)) {
      Args down = a;
      down.cols = 1;
      down.out = memory;
      first.push_back(blocks(down, false));
      Args across = a;
      across.mode = Mode::Observe;
      across.inputs = {};
      across.inputs.formula = Formula::Given;
      across.inputs.weight = {memory, a.wide ? Dtype::Double : Dtype::Float, 1, {columns(a)}, {1}};
      second.push_back(rows(across, false));
      memory += columns_bytes(a);
    } else if (a.cols > kWidest) {
      first.push_back(rows(a, true));
    } else {
      first.push_back(blocks(a, true));
    }
  }
  launch(first, stream);
  launch(second, stream);
  return cudaGetLastError();
}

}  // namespace secateur::score::CUDA
