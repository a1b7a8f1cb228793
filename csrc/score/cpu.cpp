// Fused scores: one pass over weight, gradient and state; bound by reading them. Blocks are reduced
// while a run of columns is in L1, so only the block scores are written.
// Compiled once per instruction set; no torch header, no static data (see cmake/op.cmake).
#include <algorithm>

#include "common/evaluate.h"
#include "score/score.h"

namespace secateur::score::SECATEUR_ISA {
namespace {

// Columns of a strip of rows that are reduced at a time: what they are reduced to stays in L1, and
// a row's part is long enough to be foreseen by the hardware. Fewer where blocks are high, so that
// there are tasks enough for all threads.
constexpr int kColumns = 4096;
constexpr int kMinColumns = 512;
constexpr int64_t kTaskElements = 1 << 18;

// A task of blocks(): `per_task` neighbouring blocks of one strip of rows, at most kColumns columns
// unless one block is wider than that.
struct Grid {
  int64_t block_cols, per_task, tasks_per_strip, strips;

  explicit Grid(const Args& a)
      : block_cols((a.n_cols + a.cols - 1) / a.cols),
        per_task(std::max<int64_t>(
            1, std::clamp<int64_t>(kTaskElements / a.rows, kMinColumns, kColumns) / a.cols)),
        tasks_per_strip((block_cols + per_task - 1) / per_task),
        strips((a.n_rows + a.rows - 1) / a.rows) {}
};

// into[i] = combine(into[i], enter(from[i]))
template <Reduce R, bool kEnter, typename T>
inline void combine_run(T* into, const T* from, int64_t n) {
  for_lanes<T>(n, [&]<typename V>(int64_t i) __attribute__((always_inline)) {
    V a, b;
    __builtin_memcpy(&a, into + i, sizeof(V));
    __builtin_memcpy(&b, from + i, sizeof(V));
    if constexpr (kEnter) b = enter<R>(b);
    a = combine<R>(a, b);
    __builtin_memcpy(into + i, &a, sizeof(V));
  });
}

// column[c] = rows row..row_end of column col + c, reduced in row order.
template <Reduce R, typename T>
void reduce_columns(const Args& a, int64_t row, int64_t row_end, int64_t col, int64_t n,
                    T* column) {
  alignas(64) T scores[kRun];
  std::fill_n(column, n, identity<T>(R));
  const bool whole = n == a.n_cols;
  // Whole rows are one stretch of elements: short ones go several at a time. Of parts, the next
  // row's does not follow this one.
  const int64_t step = whole ? std::max<int64_t>(1, kRun / n) : 1;
  Scorer<T> scorer(a.inputs, a.mode, whole || row + 1 == row_end ? kAhead : a.n_cols);
  for (; row < row_end; row += step) {
    const int64_t rows = std::min(step, row_end - row), first = row * a.n_cols + col;
    scorer.for_words(first, rows * n, [&](const T* word, int64_t index, int64_t left) {
      if (rows == 1)
        combine_run<R, true>(column + (index - first), word, std::min<int64_t>(left, 64));
      else
        std::copy_n(word, 64, scores + (index - first));
    });
    if (rows == 1) continue;
    for (int64_t r = 0; r < rows; ++r) combine_run<R, true>(column, scores + r * n, n);
  }
}

// Lane j takes columns j, j + kReduceLanes, ... in order.
template <Reduce R, typename T>
inline void fold(T* lanes, const T* column, int64_t n) {
  int64_t i = 0;
  for (; i + kReduceLanes <= n; i += kReduceLanes)
    combine_run<R, false>(lanes, column + i, kReduceLanes);
  for (int64_t j = 0; i + j < n; ++j) lanes[j] = combine<R>(lanes[j], column[i + j]);
}

template <Reduce R, typename T>
inline T halve(T* lanes) {
  for (int half = kReduceLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] = combine<R>(lanes[j], lanes[j + half]);
  return lanes[0];
}

template <Reduce R, typename T>
void run_blocks(const Args& a, int64_t begin, int64_t end) {
  const Grid grid(a);
  alignas(64) T column[kColumns];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t strip = task / grid.tasks_per_strip;
    const int64_t row = strip * a.rows;
    const int64_t row_end = std::min(row + a.rows, a.n_rows);
    const int64_t block = task % grid.tasks_per_strip * grid.per_task;
    const int64_t block_end = std::min(block + grid.per_task, grid.block_cols);
    const int64_t col = block * a.cols;
    const int64_t col_end = std::min(block_end * a.cols, a.n_cols);
    T* const out = static_cast<T*>(a.out) + strip * grid.block_cols + block;
    if (a.cols > kColumns) {  // one wide block, piece by piece
      alignas(64) T lanes[kReduceLanes];
      std::fill_n(lanes, kReduceLanes, identity<T>(R));
      for (int64_t c = col; c < col_end; c += kColumns) {
        const int64_t n = std::min<int64_t>(kColumns, col_end - c);
        reduce_columns<R>(a, row, row_end, c, n, column);
        fold<R>(lanes, column, n);
      }
      *out = leave<R>(halve<R>(lanes), (row_end - row) * (col_end - col));
      continue;
    }
    reduce_columns<R>(a, row, row_end, col, col_end - col, column);
    for (int64_t b = 0; b < block_end - block; ++b) {
      const int64_t first = b * a.cols;
      const int64_t n = std::min(a.cols, col_end - col - first);
      T sum = column[first];
      if (a.cols > 1) {
        alignas(64) T lanes[kReduceLanes];
        std::fill_n(lanes, kReduceLanes, identity<T>(R));
        fold<R>(lanes, column + first, n);
        sum = halve<R>(lanes);
      }
      out[b] = leave<R>(sum, (row_end - row) * n);
    }
  }
}

template <typename T>
void run_elements(const Args& a, int64_t begin, int64_t end) {
  RunBuffers<T> buffers;
  for_mode(a.mode, [&]<Mode M>() {
    for (int64_t i = begin; i < end; i += kRun)
      evaluate<M>(a.inputs, i, std::min<int64_t>(kRun, end - i), buffers,
                  static_cast<T*>(a.out) + i);
  });
}

template <typename T>
void run_observe(const Args& a, int64_t begin, int64_t end) {
  RunBuffers<T> buffers;
  for (int64_t i = begin; i < end; i += kRun)
    evaluate<Mode::Update, false>(a.inputs, i, std::min<int64_t>(kRun, end - i), buffers,
                                  static_cast<T*>(nullptr));
}

}  // namespace

int64_t n_tasks(const Args& args) {
  const Grid grid(args);
  return grid.strips * grid.tasks_per_strip;
}

void elements(const Args& args, int64_t begin, int64_t end) {
  args.wide ? run_elements<double>(args, begin, end) : run_elements<float>(args, begin, end);
}

void blocks(const Args& args, int64_t begin, int64_t end) {
  for_reduce(args.reduce, [&]<Reduce R>() {
    args.wide ? run_blocks<R, double>(args, begin, end) : run_blocks<R, float>(args, begin, end);
  });
}

void observe(const Args& args, int64_t begin, int64_t end) {
  args.wide ? run_observe<double>(args, begin, end) : run_observe<float>(args, begin, end);
}

}  // namespace secateur::score::SECATEUR_ISA
