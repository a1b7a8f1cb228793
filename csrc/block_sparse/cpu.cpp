// Block-sparse products. Bound by fused multiply-adds: every live weight is multiplied once by
// every row of the batch, accumulators stay in registers over all blocks that meet one output, and
// an output is written once.
//
// Most of it is one micro kernel, add_products(): C[i][v] += sum over l of A[i, l] * B[l, v], with
// A broadcast and v in vector lanes. What runs over the lanes depends on the block:
//   Features  blocks that vectors divide: lanes are features; B is a block (transposed beforehand
//             for the forward product), A is X or dY. In dW, B is X and A is dY.
//   Batch     all others, single weights too, and forward of 3 to 15 rows: lanes are rows of the
//             batch, A is the block and B is X or dY, transposed beforehand. For dW the same layout
//             gives dot products, and for single weights dX and dW come from one pass.
//   Dots      forward of one or two rows: lanes run along a block's columns, so that weights are
//             read once, in the order of memory.
// bfloat16 is multiplied in pairs along the inner dimension where the CPU can and sizes are even,
// and widened otherwise.
// Along the inner dimension a block that sticks out over the edge is walked up to the edge only,
// so what is stored beyond it is never multiplied.
// Compiled once per instruction set; no torch header, no static data (see cmake/op.cmake).
#include <algorithm>
#include <type_traits>

#include "block_sparse/block_sparse.h"
#include "common/activation.h"
#include "common/simd.h"

#define SECATEUR_INLINE __attribute__((always_inline))
// A tile's function: inlined, it would share registers with its callers, and read its strides back
// from the stack in the innermost loop.
#define SECATEUR_TILE __attribute__((noinline)) inline

namespace secateur::block_sparse::SECATEUR_ISA {
namespace {

// Fewer rows than this do not pay for transposing the weights.
constexpr int64_t kFewRows = 16;
constexpr int64_t kFewLanes = 16;    // lanes of a panel where the batch is small
constexpr int64_t kFewestLanes = 8;  // of smaller ones, which a vector of 512 bits exceeds
constexpr int kDotRows = 2;          // more rows than this do not pay for sums across lanes
// Fewer rows than this do not pay for a copy of the weights in the order in which dX takes them.
// Only on 16 registers, whose tiles take part of a line of most blocks; with 32 it gained nothing.
constexpr int64_t kRowsToReorder = 512;
constexpr int64_t kPackRows = 8;              // rows of the batch copied to panels at a time
constexpr int64_t kPackAhead = 256;           // features from what is copied to what is fetched
constexpr int64_t kBlocksAhead = 8;           // blocks, where they are copied in another order
constexpr int64_t kWeightsAhead = 64;         // the same of single weights
constexpr int64_t kSmallBlock = 16;           // weights
constexpr int64_t kTaskMultiplies = 1 << 16;  // worth waking a thread

// Output features that Batch transposes at a time: lines of one row are written one after the
// other, as rows are often a power of two apart and share few sets of L1. And input features that
// are not packed if no live block multiplies them.
constexpr int64_t kFeatureChunk = 64;
// Features that are transposed for a few rows of the batch before the next rows: in long runs the
// machine sees which lines come next.
constexpr int64_t kPackChunk = 512;

// Accumulators a tile may hold: the rest of the registers take B and the broadcast.
constexpr int kAccumulators = kVectorRegisters == 32 ? 16 : 8;
constexpr int kMaxVectors = kVectorRegisters == 32 ? 4 : 2;
// Features on 16 registers: six rows of two vectors keep both multipliers busy, four do not. A tile
// of six finds its left operand in panels, which the next tile's follows, and not transposed.
constexpr int kFeatureAccumulators = kVectorRegisters == 32 ? 16 : 12;
constexpr Layout kFeatureLayout = kVectorRegisters == 32 ? Layout::Transposed : Layout::Panels;
// Rows of a panel for Features, whole tiles; on 16 registers also for Batch, as three vectors.
constexpr int64_t kFeaturePanel = kVectorRegisters == 32 ? kFewLanes : 24;
constexpr int64_t kFeatureRows = kVectorRegisters == 32 ? 64 : 72;  // in one task

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename C, int R, int NV, int W>
struct Tile {
  Vec<C, W> acc[R][NV];
};

using One = std::integral_constant<int64_t, 1>;
using FewLanes = std::integral_constant<int64_t, kFewLanes>;

// a(i, l) = a[i * line + l * step]; strides are int64_t or compile-time constants. E is what is
// multiplied: C, or uint32_t for pairs along the inner dimension. `next`, if not null, is as much
// of A that will be read later, without gaps.
template <typename C, int R, int NV, int W, typename E, typename B, typename Line, typename Step,
          typename Next = std::nullptr_t>
SECATEUR_INLINE inline void add_products(Tile<C, R, NV, W>& tile, const E* a, Line line, Step step,
                                         const B* b, int64_t b_step, int64_t inner,
                                         Next next = {}) {
  // Lines of any stride are reached from every third: a register for each would be too many.
  constexpr int kNear = std::is_same_v<Line, int64_t> ? 3 : R;
  const E* lines[(R + kNear - 1) / kNear];
  unroll<(R + kNear - 1) / kNear>([&](auto g) SECATEUR_INLINE { lines[g] = a + g * kNear * line; });
  for (int64_t l = 0; l < inner; ++l) {
    Vec<E, W> right[NV];
    unroll<NV>([&](auto v) SECATEUR_INLINE { right[v] = load<W>(b + v * W); });
    unroll<R>([&](auto i) SECATEUR_INLINE {
      const Vec<E, W> left = broadcast<Vec<E, W>>(lines[i / kNear][i % kNear * line]);
      unroll<NV>([&](auto v) SECATEUR_INLINE {
        tile.acc[i][v] = multiply_add<C, W, E>(tile.acc[i][v], left, right[v]);
      });
    });
    if constexpr (!std::is_null_pointer_v<Next>) __builtin_prefetch(next + l * R);
    for (const E*& at : lines) at += step;
    b += b_step;
  }
}

// Rows are taken in tiles of R, then of kFewer<R>. Eight are two tiles of four: what is left of six
// and two would not hide the latency of its additions.
template <int R>
constexpr int kFewer = R == 6 ? 4 : R / 2;
template <int R>
constexpr bool in_tile(int64_t rows) {
  return rows >= R && (R != 6 || rows != 8);
}

// Calls f(NV, j) for columns j, j + NV * W, ... below `limit` of a block that is `width` wide, NV
// being the widest tile that fits; W divides `width`.
template <int W, typename F>
inline void for_vectors(int64_t width, int64_t limit, F&& f) {
  const auto step = [&](auto nv, int64_t j) {
    f(nv, j);
    return j + nv * W;
  };
  for (int64_t j = 0; j < limit;) {
    const int64_t vectors = (width - j) / W;
    j = vectors >= kMaxVectors ? step(std::integral_constant<int, kMaxVectors>{}, j)
        : vectors >= 2         ? step(std::integral_constant<int, 2>{}, j)
                               : step(std::integral_constant<int, 1>{}, j);
  }
}

// The pattern seen from one side: a line is a block row in Forward, a block column in
// InputGradient. Its blocks are [ptr[line], ptr[line + 1]); `index` is a block's place along the
// inner dimension and `position` its place in the values (null: in order).
struct Side {
  const int32_t *ptr, *index, *position;
  int64_t lines, line_width, inner_width, out_features, inner_features;
  bool stripes;  // as in Plan

  int64_t block(int64_t p) const { return position ? position[p] : p; }
  int64_t inner(int64_t p) const {
    return std::min(inner_width, inner_features - index[p] * inner_width);
  }
};

Side side_of(const Args& g) {
  const bool stripes = g.plan.stripes;
  if (g.product != Product::Forward)
    return {g.col_ptr,     g.row_t,        g.plan.reorder_values ? nullptr : g.position_t,
            g.block_cols,  g.cols,         g.rows,
            g.in_features, g.out_features, stripes};
  return {g.row_ptr, g.col,          nullptr,       g.block_rows, g.rows,
          g.cols,    g.out_features, g.in_features, stripes};
}

// The same counted in pairs along the inner dimension.
Side paired(Side s) {
  s.inner_width /= 2;
  s.inner_features /= 2;
  return s;
}

// Parallel items are panels x (live blocks + one for each group of lines), so that equal ranges are
// equal work however the blocks are spread. A group belongs to the range its first item is in.
template <typename F>
inline void for_groups(const int32_t* ptr, int64_t lines, int64_t per_group, int64_t begin,
                       int64_t end, F&& f) {
  const int64_t groups = ceil_div(lines, per_group);
  const int64_t total = ptr[lines] + groups;
  for (int64_t panel = begin / total; panel * total < end; ++panel) {
    const int64_t low = std::max<int64_t>(begin - panel * total, 0);
    const int64_t high = std::min(end - panel * total, total);
    const auto start = [&](int64_t group) { return ptr[group * per_group] + group; };
    int64_t group = 0;
    for (int64_t size = groups; size > 0;) {  // first group that starts at `low` or later
      const int64_t half = size / 2;
      if (start(group + half) < low) {
        group += half + 1;
        size -= half + 1;
      } else {
        size = half;
      }
    }
    for (; group < groups && start(group) < high; ++group) f(panel, group);
  }
}

Stage group_stage(const int32_t* ptr, int64_t lines, int64_t per_group, int64_t panels,
                  int64_t multiplies) {
  const int64_t total = ptr[lines] + ceil_div(lines, per_group);
  return {panels * total, std::max<int64_t>(1, kTaskMultiplies / std::max<int64_t>(1, multiplies))};
}

// What is done to a result before it is rounded to T and written.
template <typename T>
struct Epilogue {
  const T* bias;  // may be null
  Activation activation;

  explicit Epilogue(const Args& g)
      : bias(static_cast<const T*>(g.bias)), activation(g.activation) {}

  template <typename V>
  V operator()(V v) const {
    return activation == Activation::Relu ? relu(v) : activation == Activation::Gelu ? gelu(v) : v;
  }
};

// Asks for `rows` times `count` elements that will soon be read, in an order that the machine does
// not foresee. Inlined: a compiler takes a function that only prefetches for one without effect.
template <typename E>
SECATEUR_INLINE inline void expect(const E* at, int64_t stride, int64_t rows, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(E);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < count; j += kLine) __builtin_prefetch(at + i * stride + j, 0, 2);
}

// The blocks of a line, where they lie apart in memory.
template <typename B>
SECATEUR_INLINE inline void expect_blocks(const Side& s, const B* blocks, int64_t line) {
  const int64_t size = s.line_width * s.inner_width;
  constexpr int64_t kFewest = 64 / sizeof(B), kMost = 4096 / sizeof(B);  // foreseen by then
  if (!s.position || line >= s.lines || size < kFewest || size > kMost) return;
  for (int64_t p = s.ptr[line]; p < s.ptr[line + 1]; ++p)
    expect(blocks + s.position[p] * size, 0, 1, size);
}

// ---------------------------------------------------------------- packing

// Calls f.template operator()<W>(i) for whole vectors of `count` elements, then for half a vector
// (of 512 bits: a block of 8); returns how many elements that were.
template <int W, typename F>
SECATEUR_INLINE inline int64_t for_runs(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + W <= count; i += W) f.template operator()<W>(i);
  if (i + W / 2 <= count) {
    f.template operator()<W / 2>(i);
    i += W / 2;
  }
  return i;
}

template <typename T>
void widen_range(const T* from, Compute<T>* to, int64_t count) {
  int64_t i = for_runs<kLanes<Compute<T>>>(
      count, [&]<int W>(int64_t at) SECATEUR_INLINE { store<W>(to + at, load<W>(from + at)); });
  for (; i < count; ++i) to[i] = widen(from[i]);
}

// The features of X or dY, in lines of `width` that a block multiplies whole; ptr as in Side.
// What no live block multiplies need not be packed.
struct PackedFeatures {
  int64_t count, width;
  const int32_t* ptr;

  bool live(int64_t first, int64_t last) const {
    return ptr[first / width] < ptr[ceil_div(last, width)];
  }
};

// From one row of a panel to the next: rows of 512 bytes, 128 floats, would share an eighth of the
// sets of L1.
constexpr int64_t panel_row(int64_t width) { return width % 128 == 0 ? width + 16 : width; }

// Calls f(m, feature, count) for each row m of [begin, end) and each line of features, a few rows
// at a time: memory streams along rows, and a panel gets more than a line of each.
template <typename F>
inline void for_panels(const PackedFeatures& features, int64_t begin, int64_t end, F&& f) {
  for (int64_t m0 = begin; m0 < end; m0 += kPackRows)
    for (int64_t feature = 0; feature < features.count; feature += features.width) {
      const int64_t last = std::min(feature + features.width, features.count);
      if (!features.live(feature, last)) continue;
      for (int64_t m = m0; m < std::min(m0 + kPackRows, end); ++m) f(m, feature, last - feature);
    }
}

// Rows [begin, end) of the batch to Layout::Panels.
template <typename T>
void pack_panels(const T* from, int64_t stride, int64_t batch, const PackedFeatures& features,
                 Compute<T>* to, int64_t begin, int64_t end) {
  for_panels(features, begin, end, [&](int64_t m, int64_t feature, int64_t count) {
    Compute<T>* const row = to + (feature / features.width * batch + m) * panel_row(features.width);
    widen_range(from + m * stride + feature, row, count);
    for (int64_t i = count; i < features.width; ++i) row[i] = 0;
  });
}

// Pairs of a row and the next, or of a row and zeros.
inline void pair_rows(const BFloat16* first, const BFloat16* second, uint32_t* to, int64_t count) {
  int64_t i = for_runs<kLanes<float>>(count, [&]<int W>(int64_t at) SECATEUR_INLINE {
    Vec<uint16_t, W> low, high{};
    std::memcpy(&low, first + at, sizeof(low));
    if (second) std::memcpy(&high, second + at, sizeof(high));
    const auto wide = __builtin_convertvector(high, Vec<uint32_t, W>) << 16;
    store<W>(to + at, wide | __builtin_convertvector(low, Vec<uint32_t, W>));
  });
  for (; i < count; ++i)
    to[i] = uint32_t{first[i].bits} | (second ? uint32_t{second[i].bits} << 16 : 0u);
}

// Rows 2 * [begin, end) of the batch to Layout::Panels, in pairs of rows.
void pack_paired_panels(const BFloat16* from, int64_t stride, int64_t batch,
                        const PackedFeatures& features, uint32_t* to, int64_t begin, int64_t end) {
  const int64_t pairs = ceil_div(batch, 2);
  for_panels(features, begin, end, [&](int64_t m, int64_t feature, int64_t count) {
    const BFloat16* const first = from + 2 * m * stride + feature;
    uint32_t* const row = to + (feature / features.width * pairs + m) * panel_row(features.width);
    expect(first + kPackAhead, stride, 2, count);
    pair_rows(first, 2 * m + 1 < batch ? first + stride : nullptr, row, count);
    std::fill_n(row + count, features.width - count, 0u);
  });
}

// `rows` x W elements at `from` to their transpose at `to`, W wide and zero after `rows`. Unrolled:
// with an index that is not a constant the vectors would live in memory.
template <int W, typename T>
SECATEUR_INLINE inline void transpose_tile(const T* from, int64_t stride, int64_t rows,
                                           Compute<T>* to, int64_t to_stride) {
  using C = Compute<T>;
  Vec<C, W> v[W];
  unroll<W>([&](auto i)
                SECATEUR_INLINE { v[i] = i < rows ? load<W>(from + i * stride) : Vec<C, W>{}; });
  transpose<C, W>(v);
  unroll<W>([&](auto i) SECATEUR_INLINE { store<W>(to + i * to_stride, v[i]); });
}

// The same of fewer columns, `cols`.
template <int W, typename T>
void transpose_corner(const T* from, int64_t stride, int64_t rows, int64_t cols, Compute<T>* to,
                      int64_t to_stride) {
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < W; ++i)
      to[j * to_stride + i] = i < rows ? widen(from[i * stride + j]) : Compute<T>{0};
}

// Vectors across `lanes` lanes of the batch.
template <typename C>
constexpr int kFewestWide = std::min<int>(kLanes<C>, kFewestLanes);
template <typename C, typename F>
void for_lanes(int64_t lanes, F&& f) {
  if (lanes == kFewestLanes) return f.template operator()<kFewestWide<C>, kFewestLanes>();
  f.template operator()<kLanes<C>, kBatchLanes>();
}

// Layout::Transposed; an item is kPackChunk features of one panel. W divides `lanes`.
template <int W, typename T>
void pack_transposed(const T* from, int64_t stride, int64_t batch, const PackedFeatures& features,
                     int64_t lanes, Compute<T>* to, int64_t begin, int64_t end) {
  const int64_t chunks = ceil_div(features.count, kPackChunk);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item / chunks, first = item % chunks * kPackChunk;
    const int64_t last = std::min(first + kPackChunk, features.count);
    Compute<T>* const out = to + panel * features.count * lanes;
    for (int64_t m0 = 0; m0 < lanes; m0 += W) {
      const int64_t m = panel * lanes + m0;
      const int64_t rows = std::clamp<int64_t>(batch - m, 0, W);
      const T* const row = from + (rows > 0 ? m * stride : 0);
      for (int64_t f0 = first; f0 < last; f0 += kFeatureChunk) {
        const int64_t f_end = std::min(f0 + kFeatureChunk, last);
        if (!features.live(f0, f_end)) continue;
        for (int64_t f = f0; f < f_end; f += W) {
          const int64_t cols = std::min<int64_t>(W, f_end - f);
          Compute<T>* const place = out + f * lanes + m0;
          if (rows == W && cols == W)
            transpose_tile<W>(row + f, stride, W, place, lanes);
          else if (cols == W)
            transpose_tile<W>(row + f, stride, rows, place, lanes);
          else
            transpose_corner<W>(row + f, stride, rows, cols, place, lanes);
        }
      }
    }
  }
}

// ---------------------------------------------------------------- Features

// The left operand of block `index` begins at a + index * a_block.
template <typename T, int R, int NV, typename E, typename B, typename Line, typename Step>
SECATEUR_TILE void feature_tile(const Side& s, int64_t line, const E* a, int64_t a_block,
                                Line a_line, Step a_step, const B* blocks, int64_t j,
                                const Epilogue<T>& epilogue, T* out) {
  using C = Compute<T>;
  constexpr int W = kLanes<C>;
  Tile<C, R, NV, W> tile = {};
  T* const place = out + line * s.line_width + j;
  unroll<R>([&](auto i) SECATEUR_INLINE {  // in time for the store, however far the memory is
    unroll<NV>([&](auto v)
                   SECATEUR_INLINE { __builtin_prefetch(place + i * s.out_features + v * W, 1); });
  });
  const B* const first = blocks + j * (s.stripes ? s.inner_width : 1);
  const int64_t b_step = s.stripes ? NV * W : s.line_width;
  for (int64_t p = s.ptr[line]; p < s.ptr[line + 1]; ++p)
    add_products(tile, a + s.index[p] * a_block, a_line, a_step,
                 first + s.block(p) * s.line_width * s.inner_width, b_step, s.inner(p));
  const int64_t f = line * s.line_width + j;
  if (f + NV * W <= s.out_features && epilogue.activation == Activation::None) {
    unroll<NV>([&](auto v) SECATEUR_INLINE {
      Vec<C, W> offset = {};
      if (epilogue.bias) offset = load<W>(epilogue.bias + f + v * W);
      unroll<R>([&](auto i) SECATEUR_INLINE {
        store_flushed<W>(out + i * s.out_features + f + v * W, tile.acc[i][v] + offset);
      });
    });
    return;
  }
  // By way of memory: branches on vectors that live in registers cost the loop above its registers.
  alignas(64) C rows[R][NV * W];
  unroll<R>([&](auto i) SECATEUR_INLINE {
    unroll<NV>([&](auto v) SECATEUR_INLINE { store<W>(rows[i] + v * W, tile.acc[i][v]); });
  });
  for (int v = 0; v < NV; ++v) {
    const int64_t count = std::clamp<int64_t>(s.out_features - f - v * W, 0, W);
    Vec<C, W> offset = {};
    if (epilogue.bias) offset = load_first<W>(epilogue.bias + f + v * W, count);
    for (int i = 0; i < R; ++i)
      store_first<W>(out + i * s.out_features + f + v * W,
                     epilogue(load<W>(rows[i] + v * W) + offset), count);
  }
}

// Rows [m, end) of the batch in tiles of R, then of fewer.
template <typename T, int R, int NV, Layout kLayout, typename E, typename B>
inline void feature_rows(const Args& g, const Side& s, int64_t line, int64_t j, const B* blocks,
                         const E* a, int64_t stride, int64_t m, int64_t end) {
  T* const out = static_cast<T*>(g.out);
  const Epilogue<T> epilogue(g);
  for (; in_tile<R>(end - m); m += R) {
    T* const row = out + m * s.out_features;
    if constexpr (kLayout == Layout::Transposed) {
      const E* const left = a + m / kFewLanes * s.inner_features * kFewLanes + m % kFewLanes;
      feature_tile<T, R, NV>(s, line, left, s.inner_width * kFewLanes, One{}, FewLanes{}, blocks, j,
                             epilogue, row);
    } else {
      const int64_t a_block = kLayout == Layout::Panels ? stride * g.batch : s.inner_width;
      feature_tile<T, R, NV>(s, line, a + m * stride, a_block, stride, One{}, blocks, j, epilogue,
                             row);
    }
  }
  if constexpr (R > 1)
    if (m < end) feature_rows<T, kFewer<R>, NV, kLayout>(g, s, line, j, blocks, a, stride, m, end);
}

// A line without blocks, rows [m, end) of the batch: what the epilogue makes of zero, row by row.
// Tiles narrower than the line would write a part of every row before the next part.
template <typename T>
void empty_line(const Args& g, const Side& s, int64_t line, int64_t width, int64_t m, int64_t end) {
  using C = Compute<T>;
  constexpr int W = kLanes<C>;
  const Epilogue<T> epilogue(g);
  const int64_t f = line * s.line_width;
  T* const first = static_cast<T*>(g.out) + m * s.out_features + f;
  for (int64_t j = 0; j < width; j += W) {
    const int64_t count = std::min<int64_t>(W, width - j);
    Vec<C, W> offset = {};
    if (epilogue.bias) offset = load_first<W>(epilogue.bias + f + j, count);
    store_first<W>(first + j, epilogue(offset), count);
  }
  for (int64_t i = 1; i < end - m; ++i) std::copy_n(first, width, first + i * s.out_features);
}

template <typename T, Layout kLayout, typename E, typename B>
void run_features(const Args& g, const B* blocks, const E* a, int64_t stride, int64_t begin,
                  int64_t end) {
  constexpr int W = kLanes<Compute<T>>;
  const Side s = g.plan.pairs ? paired(side_of(g)) : side_of(g);
  for_groups(s.ptr, s.lines, 1, begin, end, [&](int64_t panel, int64_t line) {
    const int64_t m = panel * kFeatureRows, m_end = std::min(m + kFeatureRows, g.batch);
    if (panel == 0 && g.first_part && !g.values_space) expect_blocks(s, blocks, line + 1);
    const int64_t width = std::min(s.line_width, s.out_features - line * s.line_width);
    if (s.ptr[line] == s.ptr[line + 1] && width > kMaxVectors * W)
      return empty_line<T>(g, s, line, width, m, m_end);
    for_vectors<W>(s.line_width, width, [&](auto nv, int64_t j) {
      constexpr int NV = decltype(nv)::value;
      feature_rows<T, kFeatureAccumulators / NV, NV, kLayout>(g, s, line, j, blocks, a, stride, m,
                                                              m_end);
    });
  });
}

// ---------------------------------------------------------------- Dots

// I output features, which divide a block, x R rows of the batch from the row that `x` and `out`
// are. Blocks are as stored.
template <typename T, int I, int R>
inline void dot_tile(const Side& s, int64_t line, int64_t i0, const Compute<T>* x,
                     int64_t panel_stride, int64_t row_stride, const T* blocks,
                     const Epilogue<T>& epilogue, T* out) {
  using C = Compute<T>;
  constexpr int W = kLanes<C>;
  constexpr int kSums = (I * R + W - 1) / W * W;
  const int64_t begin = s.ptr[line], end = s.ptr[line + 1];
  const T* const first = blocks + i0 * s.inner_width;
  alignas(64) C lanes[kSums][W] = {};
  {
    Tile<C, I, R, W> tile = {};
    for (int64_t p = begin; p < end; ++p) {
      const T* const w = first + p * s.line_width * s.inner_width;
      const C* const a = x + s.index[p] * panel_stride;
      const int64_t inner = s.inner(p);
      unroll<I>([&](auto i) SECATEUR_INLINE {  // in the order of memory
        for (int64_t l = 0; l + W <= inner; l += W) {
          const Vec<C, W> left = load<W>(w + i * s.inner_width + l);
          unroll<R>([&](auto m) SECATEUR_INLINE {
            tile.acc[i][m] += left * load<W>(a + m * row_stride + l);
          });
        }
      });
    }
    unroll<I>([&](auto i) SECATEUR_INLINE {
      unroll<R>([&](auto m) SECATEUR_INLINE { store<W>(lanes[i * R + m], tile.acc[i][m]); });
    });
  }
  // Only the last block of a line may end within a vector.
  const int64_t tail = begin < end ? s.inner(end - 1) % W : 0;
  if (tail > 0) {
    const int64_t l0 = s.inner(end - 1) - tail;
    const T* const w = first + (end - 1) * s.line_width * s.inner_width;
    const C* const a = x + s.index[end - 1] * panel_stride;
    for (int n = 0; n < I * R; ++n)
      for (int64_t l = l0; l < l0 + tail; ++l)
        lanes[n][0] += widen(w[n / R * s.inner_width + l]) * a[n % R * row_stride + l];
  }
  for (int n0 = 0; n0 < I * R; n0 += W) {
    Vec<C, W> each[W];
    unroll<W>([&](auto k) SECATEUR_INLINE { each[k] = load<W>(lanes[n0 + k]); });
    alignas(64) C sums[W];
    store<W>(sums, sum_each<C, W>(each));
    for (int n = n0; n < std::min(I * R, n0 + W); ++n) {
      const int64_t f = line * s.line_width + i0 + n / R;
      if (f >= s.out_features) break;
      const C sum = epilogue(sums[n - n0] + (epilogue.bias ? widen(epilogue.bias[f]) : C{0}));
      out[n % R * s.out_features + f] = narrow<T>(sum);
    }
  }
}

template <typename T, int R>
inline void dot_rows(const Args& g, const Side& s, int64_t line, const Compute<T>* x,
                     int64_t panel_stride, int64_t row_stride, int64_t m) {
  constexpr int I = std::min(kLanes<Compute<T>>, kAccumulators / R);
  const int64_t width = std::min(s.line_width, s.out_features - line * s.line_width);
  for (; m + R <= g.batch; m += R)
    for (int64_t i0 = 0; i0 < width; i0 += I)
      dot_tile<T, I, R>(s, line, i0, x + m * row_stride, panel_stride, row_stride,
                        static_cast<const T*>(g.values), Epilogue<T>(g),
                        static_cast<T*>(g.out) + m * s.out_features);
  if constexpr (R > 1)
    if (m < g.batch) dot_rows<T, R / 2>(g, s, line, x, panel_stride, row_stride, m);
}

template <typename T>
void run_dots(const Args& g, int64_t begin, int64_t end) {
  const Side s = side_of(g);
  const bool in_place = g.plan.x == Layout::InPlace;
  const auto* const x = static_cast<const Compute<T>*>(in_place ? g.x : g.x_space);
  const int64_t row_stride = in_place ? g.x_stride : panel_row(g.cols);
  const int64_t panel_stride = in_place ? g.cols : row_stride * g.batch;
  for_groups(s.ptr, s.lines, 1, begin, end, [&](int64_t, int64_t line) {
    dot_rows<T, kDotRows>(g, s, line, x, panel_stride, row_stride, 0);
  });
}

// ---------------------------------------------------------------- Batch

// R neighbouring output features of one line x `lanes` rows of the batch, to out[R][lanes].
// `a` is the first block's weight of the first feature; inner features are a_step apart.
// kAhead: weights `ahead` of those that are multiplied are fetched.
template <typename C, int W, int R, int NV, bool kAhead, typename E>
SECATEUR_TILE void batch_tile(const Side& s, int64_t line, const E* a, int64_t a_line,
                              int64_t a_step, int64_t ahead, const E* b, int64_t lanes, C* out) {
  const int64_t block_size = s.line_width * s.inner_width;
  Tile<C, R, NV, W> tile = {};
  int64_t p = s.ptr[line];
  const int64_t end = s.ptr[line + 1];
  if constexpr (R == 1) {
    if (s.inner_width == 1) {
      const auto add = [&](Tile<C, R, NV, W>& to) SECATEUR_INLINE {
        add_products(to, a + s.block(p) * block_size, One{}, One{}, b + s.index[p] * lanes, lanes,
                     1);
        ++p;
      };
      if constexpr (2 * NV <= kAccumulators) {  // one chain of additions would wait for itself
        Tile<C, R, NV, W> other = {};
        while (p + 2 <= end) {
          add(tile);
          add(other);
        }
        unroll<NV>([&](auto v) SECATEUR_INLINE { tile.acc[0][v] += other.acc[0][v]; });
      }
      while (p < end) add(tile);
    }
  }
  for (; p < end; ++p) {
    const E* const left = a + s.block(p) * block_size;
    const E* const right = b + s.index[p] * s.inner_width * lanes;
    if constexpr (kAhead)
      add_products(tile, left, a_line, a_step, right, lanes, s.inner(p), left + ahead);
    else
      add_products(tile, left, a_line, a_step, right, lanes, s.inner(p));
  }
  unroll<R>([&](auto i) SECATEUR_INLINE {
    unroll<NV>([&](auto v) SECATEUR_INLINE { store<W>(out + i * lanes + v * W, tile.acc[i][v]); });
  });
}

// Lanes [v, lanes) in tiles of NV vectors, then of fewer.
template <typename C, int W, int R, int NV, bool kAhead, typename E>
inline void batch_tiles(const Side& s, int64_t line, const E* a, int64_t a_line, int64_t a_step,
                        int64_t ahead, const E* b, int64_t lanes, int64_t v, C* out) {
  for (; v + NV * W <= lanes; v += NV * W)
    batch_tile<C, W, R, NV, kAhead>(s, line, a, a_line, a_step, ahead, b + v, lanes, out + v);
  if constexpr (NV > 1)
    if (v < lanes)
      batch_tiles<C, W, R, NV == 3 ? 2 : NV / 2, kAhead>(s, line, a, a_line, a_step, ahead, b,
                                                         lanes, v, out);
}

// features[count][lanes] (and zeros up to a multiple of the vector) to rows of the batch.
template <int W, typename T>
void store_transposed(const Compute<T>* features, int64_t count, int64_t lanes,
                      const Epilogue<T>& epilogue, int64_t first, int64_t rows, T* out,
                      int64_t stride) {
  using C = Compute<T>;
  for (int64_t m = 0; m < rows; m += W) {
    for (int64_t f = 0; f < count; f += W) {
      const int64_t width = std::min<int64_t>(W, count - f);
      Vec<C, W> offset = {};
      if (epilogue.bias) offset = load_first<W>(epilogue.bias + first + f, width);
      T* const tile = out + m * stride + f;
      Vec<C, W> v[W];
      unroll<W>([&](auto i) SECATEUR_INLINE { v[i] = load<W>(features + (f + i) * lanes + m); });
      transpose<C, W>(v);
      if (width == W && rows - m >= W && epilogue.activation == Activation::None) {
        unroll<W>([&](auto i) SECATEUR_INLINE { store<W>(tile + i * stride, v[i] + offset); });
        continue;
      }
      alignas(64) C corner[W][W];
      unroll<W>([&](auto i) SECATEUR_INLINE { store<W>(corner[i], v[i] + offset); });
      for (int64_t i = 0; i < std::min<int64_t>(W, rows - m); ++i)
        store_first<W>(tile + i * stride, epilogue(load<W>(corner[i])), width);
    }
  }
}

int64_t lines_per_group(int64_t line_width) {
  return std::max<int64_t>(1, kFeatureChunk / line_width);
}

// kMostLanes is as many as the panel may have; E is as in add_products().
template <typename T, int W, int kMostLanes, typename E>
void run_batch(const Args& g, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Side s = g.plan.pairs ? paired(side_of(g)) : side_of(g);
  const bool forward = g.product == Product::Forward;
  const auto* const values = static_cast<const E*>(g.values_space ? g.values_space : g.values);
  const auto* const b = static_cast<const E*>(forward ? g.x_space : g.dy_space);
  const int64_t lanes = g.plan.panel;
  const int64_t a_line = forward ? s.inner_width : 1, a_step = forward ? 1 : g.cols;
  const int64_t per_group = lines_per_group(s.line_width);
  const Epilogue<T> epilogue(g);
  T* const out = static_cast<T*>(g.out);
  alignas(64) C features[kFeatureChunk * kMostLanes] = {};
  for_groups(s.ptr, s.lines, per_group, begin, end, [&](int64_t panel, int64_t group) {
    const int64_t first = group * per_group * s.line_width;
    const int64_t last = std::min(first + per_group * s.line_width, s.out_features);
    const E* const right = b + panel * s.inner_features * lanes;
    const int64_t m = panel * lanes;
    if (panel == 0 && g.first_part && !g.values_space)
      for (int64_t line = (group + 1) * per_group; line < (group + 2) * per_group; ++line)
        expect_blocks(s, values, line);
    for (int64_t f = first; f < last; f += kFeatureChunk) {
      const int64_t count = std::min(kFeatureChunk, last - f);
      for (int64_t i = 0; i < count;) {
        const int64_t line = (f + i) / s.line_width, inside = (f + i) % s.line_width;
        const int64_t left = std::min(count - i, s.line_width - inside);
        constexpr int kMost =  // features: two vectors each, or three
            kAccumulators / std::min<int>(2, kMostLanes / W);
        const auto run = [&](auto r) -> int64_t {
          constexpr int R = decltype(r)::value;
          constexpr int kSums = R > 1 ? kFeatureAccumulators : kAccumulators;
          constexpr int NV = std::clamp<int>(kSums / R, 1, kMostLanes / W);
          const auto tiles = [&]<bool kAhead>(int64_t ahead) {
            batch_tiles<C, W, R, NV, kAhead>(s, line, values + inside * a_line, a_line, a_step,
                                             ahead, right, lanes, 0, features + i * lanes);
          };
          // Part of each block at a time is not what the machine foresees: the next part, or the
          // first one of the next line, is fetched meanwhile.
          if (R == kMost && forward && s.line_width > R)
            tiles.template operator()<R == kMost>(inside + R < s.line_width
                                                      ? R * a_line
                                                      : (s.ptr[line + 1] - s.ptr[line]) *
                                                                s.line_width * s.inner_width -
                                                            inside * a_line);
          else
            tiles.template operator()<false>(0);
          return r;
        };
        i += left >= kMost            ? run(std::integral_constant<int, kMost>{})
             : left >= 8 && kMost > 8 ? run(std::integral_constant<int, std::min(kMost, 8)>{})
             : left >= 4              ? run(std::integral_constant<int, 4>{})
             : left >= 2              ? run(std::integral_constant<int, 2>{})
                                      : run(std::integral_constant<int, 1>{});
      }
      const int64_t rows = std::min(lanes, g.batch - m);
      T* const to = out + m * s.out_features + f;
      store_transposed<W, T>(features, count, lanes, epilogue, f, rows, to, s.out_features);
    }
  });
}

// ---------------------------------------------------------------- dW

// A matrix in Layout::Panels, or in place where its features are whole blocks.
template <typename E>
struct PanelView {
  const E* base;
  int64_t panel_stride, row_stride;
};

template <typename E>
PanelView<E> panels_of(Layout layout, const void* data, int64_t stride, const void* space,
                       int64_t block, int64_t batch) {
  if (layout == Layout::InPlace) return {static_cast<const E*>(data), block, stride};
  return {static_cast<const E*>(space), panel_row(block) * batch, panel_row(block)};
}

constexpr int64_t kPart = 64;  // rows and columns of a block that are accumulated at a time

// dY as the broadcast operand: the element of feature i and row m of the batch is at
// at(m)[i * line + (m % lanes) * step].
template <typename E, typename Line, typename Step>
struct LeftOperand {
  const E* base;
  Line line;
  Step step;
  int64_t lanes, lanes_stride;

  const E* at(int64_t m) const { return base + m / lanes * lanes_stride + m % lanes * step; }
};

// part[i..][j..] = dy^T x over rows [begin, end) of the batch, or adds it. Sums of earlier rows are
// read at the end, so that no multiply-add waits for them.
template <typename C, int W, int R, int NV, typename E, typename D>
SECATEUR_TILE void outer_rows(const D& dy, const E* x, int64_t x_stride, int64_t begin, int64_t end,
                              bool add, C* part, int64_t stride, int64_t i, int64_t rows) {
  for (; in_tile<R>(rows - i); i += R) {
    Tile<C, R, NV, W> tile = {};
    C* const to = part + i * stride;
    unroll<R>([&](auto r) SECATEUR_INLINE {  // in time for the store, however far the memory is
      unroll<NV>([&](auto v) SECATEUR_INLINE { __builtin_prefetch(to + r * stride + v * W, 1); });
    });
    for (int64_t m = begin; m < end; m += dy.lanes)
      add_products(tile, dy.at(m) + i * dy.line, dy.line, dy.step, x + m * x_stride, x_stride,
                   std::min(dy.lanes, end - m));
    if (add)
      unroll<R>([&](auto r) SECATEUR_INLINE {
        unroll<NV>([&](auto v)
                       SECATEUR_INLINE { tile.acc[r][v] += load<W>(to + r * stride + v * W); });
      });
    unroll<R>([&](auto r) SECATEUR_INLINE {
      unroll<NV>([&](auto v)
                     SECATEUR_INLINE { store<W>(to + r * stride + v * W, tile.acc[r][v]); });
    });
  }
  if constexpr (R > 1)
    if (i < rows)
      outer_rows<C, W, kFewer<R>, NV>(dy, x, x_stride, begin, end, add, part, stride, i, rows);
}

template <typename C, int W, typename E, typename D>
void outer_part(const D& dy, const E* x, int64_t x_stride, int64_t begin, int64_t end, bool add,
                C* part, int64_t stride, int64_t rows, int64_t cols) {
  for_vectors<W>(cols, cols, [&](auto nv, int64_t j) {
    constexpr int NV = decltype(nv)::value;
    constexpr int R = NV == 1 ? kAccumulators : kFeatureAccumulators / NV;
    outer_rows<C, W, R, NV>(dy, x + j, x_stride, begin, end, add, part + j, stride, 0, rows);
  });
}

// Blocks [begin, end); W divides cols.
template <typename T, int W, typename E>
void run_outer(const Args& g, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t batch = g.plan.pairs ? ceil_div(g.batch, 2) : g.batch;
  const auto dy = panels_of<E>(g.plan.dy, g.dy, g.dy_stride, g.dy_space, g.rows, batch);
  const auto x = panels_of<E>(g.plan.x, g.x, g.x_stride, g.x_space, g.cols, batch);
  // Rows of the batch whose share of both panels stays in L1 while the tiles of a part pass over
  // it.
  const int64_t depth =
      ceil_div(4096 / (std::min(g.rows, kPart) + std::min(g.cols, kPart)), g.plan.panel) *
      g.plan.panel;
  C* const sums = static_cast<C*>(g.sums);  // of earlier parts of the batch
  alignas(64) C part[kPart * kPart];        // of a block that sticks out over the edge
  for (int64_t p = begin; p < end; ++p) {
    const int64_t live_rows = std::min(g.rows, g.out_features - g.row_of[p] * g.rows);
    const int64_t live_cols = std::min(g.cols, g.in_features - g.col[p] * g.cols);
    const bool whole = live_rows == g.rows && live_cols == g.cols;
    for (int64_t i0 = 0; i0 < g.rows; i0 += kPart) {
      for (int64_t j0 = 0; j0 < g.cols; j0 += kPart) {
        const int64_t rows = std::clamp<int64_t>(live_rows - i0, 0, kPart);
        const int64_t cols = std::min(kPart, g.cols - j0);
        C* const place = sums + (p * g.rows + i0) * g.cols + j0;
        C* const to = whole ? place : part;
        const int64_t stride = whole ? g.cols : kPart;
        if (!whole && !g.first_part)
          for (int64_t i = 0; i < rows; ++i)
            std::copy_n(place + i * g.cols, cols, part + i * kPart);
        const E* const right = x.base + g.col[p] * x.panel_stride + j0;
        const auto sum = [&](const auto& left) {
          int64_t m = 0;
          do {  // once for an empty batch, too
            outer_part<C, W>(left, right, x.row_stride, m, std::min(m + depth, batch),
                             m > 0 || !g.first_part, to, stride, rows, cols);
          } while ((m += depth) < batch);
        };
        if (g.plan.dy == Layout::Transposed) {
          const E* const left =
              static_cast<const E*>(g.dy_space) + (g.row_of[p] * g.rows + i0) * g.plan.panel;
          const auto sum_lanes = [&](auto lanes) {
            sum(LeftOperand<E, decltype(lanes), One>{left, {}, {}, lanes, g.out_features * lanes});
          };
          if (g.plan.panel == kFewLanes)
            sum_lanes(std::integral_constant<int64_t, kFewLanes>{});
          else if (g.plan.panel == kFeaturePanel)
            sum_lanes(std::integral_constant<int64_t, kFeaturePanel>{});
          else
            sum_lanes(std::integral_constant<int64_t, kBatchLanes>{});
        } else {
          sum(LeftOperand<E, One, int64_t>{
              dy.base + g.row_of[p] * dy.panel_stride + i0, {}, dy.row_stride, batch, 0});
        }
        if (whole) continue;
        for (int64_t i = 0; i < std::min(kPart, g.rows - i0); ++i) {
          const int64_t live = i < rows ? std::clamp<int64_t>(live_cols - j0, 0, cols) : 0;
          for (int64_t j = 0; j < cols; ++j)
            place[i * g.cols + j] = j < live ? part[i * kPart + j] : C{0};
        }
      }
    }
  }
}

// acc[k] += dy * at[k], lane by lane, over one transposed panel.
template <typename C, int W>
SECATEUR_INLINE inline void dot_panel(const C* dy, const C* const (&at)[W], int64_t lanes,
                                      Vec<C, W> (&acc)[W]) {
  constexpr int NV = 4;  // vectors of dY held in registers
  int64_t v = 0;
  for (; v + NV * W <= lanes; v += NV * W) {
    Vec<C, W> held[NV];
    unroll<NV>([&](auto n) SECATEUR_INLINE { held[n] = load<W>(dy + v + n * W); });
    unroll<W>([&](auto k) SECATEUR_INLINE {
      const C* const x = at[k] + v;
      unroll<NV>([&](auto n) SECATEUR_INLINE { acc[k] += held[n] * load<W>(x + n * W); });
    });
  }
  for (; v < lanes; v += W) {
    const Vec<C, W> held = load<W>(dy + v);
    unroll<W>([&](auto k) SECATEUR_INLINE { acc[k] += held * load<W>(at[k] + v); });
  }
}

// The weights in row `i` of block row `line`: dot products of dY's feature and X's features over
// `panels` transposed panels, W weights at a time.
template <typename C>
inline void dot_weights(const Args& g, int64_t line, int64_t i, const C* dy, const C* x,
                        int64_t panels, bool accumulate, C* out) {
  constexpr int W = kLanes<C>;
  const int64_t lanes = g.plan.panel;
  const int64_t count = (g.row_ptr[line + 1] - g.row_ptr[line]) * g.cols;
  int64_t p = g.row_ptr[line], j = 0;
  for (int64_t e = 0; e < count; e += W) {
    const int64_t width = std::min<int64_t>(W, count - e);
    const C* at[W];
    int64_t to[W];
    uint32_t inside = 0;
    for (int k = 0; k < W; ++k) {
      if (k >= width) {  // a short group repeats its last weight
        at[k] = at[k - 1];
        continue;
      }
      const int64_t feature = g.col[p] * g.cols + j;
      const bool exists = feature < g.in_features;
      at[k] = x + (exists ? feature : 0) * lanes;
      inside |= uint32_t{exists} << k;
      to[k] = (p * g.rows + i) * g.cols + j;
      if (++j == g.cols) {
        j = 0;
        ++p;
      }
    }
    Vec<C, W> acc[W] = {};
    for (int64_t panel = 0; panel < panels; ++panel) {
      dot_panel<C, W>(dy + panel * g.out_features * lanes, at, lanes, acc);
      for (int k = 0; k < W; ++k) at[k] += g.in_features * lanes;
    }
    alignas(64) C sums[W];
    store<W>(sums, sum_each<C, W>(acc));
    for (int64_t k = 0; k < width; ++k)
      out[to[k]] = (accumulate ? out[to[k]] : C{0}) + (inside >> k & 1 ? sums[k] : C{0});
  }
}

// The same for blocks of 1 x 1, whose weights of one row are neighbours in memory.
template <typename C>
inline void dot_single_weights(const Args& g, int64_t line, const C* dy, const C* x, int64_t panels,
                               bool accumulate, C* out) {
  constexpr int W = kLanes<C>;
  const int64_t lanes = g.plan.panel;
  for (int64_t p = g.row_ptr[line], end = g.row_ptr[line + 1]; p < end; p += W) {
    const int64_t width = std::min<int64_t>(W, end - p);
    const C* at[W];
    for (int64_t k = 0; k < W; ++k) at[k] = x + g.col[p + std::min(k, width - 1)] * lanes;
    Vec<C, W> acc[W] = {};
    for (int64_t panel = 0; panel < panels; ++panel) {
      dot_panel<C, W>(dy + panel * g.out_features * lanes, at, lanes, acc);
      for (int k = 0; k < W; ++k) at[k] += g.in_features * lanes;
    }
    Vec<C, W> sums = sum_each<C, W>(acc);
    if (accumulate) sums += load_first<W>(out + p, width);
    store_first<W>(out + p, sums, width);
  }
}

template <typename C>
void run_dot_weights(const Args& g, int64_t begin, int64_t end) {
  const int64_t lanes = g.plan.panel, panels = ceil_div(g.batch, lanes);
  const int64_t block_size = g.rows * g.cols;
  const auto* const dy = static_cast<const C*>(g.dy_space);
  const auto* const x = static_cast<const C*>(g.x_space);
  C* const out = static_cast<C*>(g.sums);
  // Panels of X that stay in L2 while all weights of a range pass over them.
  const int64_t step =
      std::max<int64_t>(1, (1 << 17) / (std::max<int64_t>(1, g.in_features) * lanes));
  for (int64_t panel = 0; panel < panels || panel == 0; panel += step) {
    for_groups(g.row_ptr, g.block_rows, 1, begin, end, [&](int64_t, int64_t line) {
      if (block_size == 1) {
        dot_single_weights<C>(g, line, dy + (panel * g.out_features + line) * lanes,
                              x + panel * g.in_features * lanes, std::min(step, panels - panel),
                              panel > 0 || !g.first_part, out);
        return;
      }
      for (int64_t i = 0; i < g.rows; ++i) {
        const int64_t feature = line * g.rows + i;
        const bool inside = feature < g.out_features;
        dot_weights<C>(g, line, i, dy + (panel * g.out_features + (inside ? feature : 0)) * lanes,
                       x + panel * g.in_features * lanes,
                       inside ? std::min(step, panels - panel) : 0, panel > 0 || !g.first_part,
                       out);
      }
    });
  }
}

// ---------------------------------------------------------------- dX and dW of single weights

// dX of one column and dW of its weights, over NV vectors of the batch: each vector of dY that is
// read serves both. `values` and `sums` are in column order.
template <typename C, int NV>
SECATEUR_TILE void backward_tile(const Side& s, int64_t line, const C* values, const C* dy,
                                 const C* x, int64_t lanes, bool accumulate, C* dx, C* sums) {
  constexpr int W = kLanes<C>;
  Vec<C, W> held[NV], acc[NV] = {};
  unroll<NV>([&](auto v) SECATEUR_INLINE { held[v] = load<W>(x + v * W); });
  int64_t p = s.ptr[line];
  const int64_t end = s.ptr[line + 1];
  const auto group = [&](auto count) SECATEUR_INLINE {  // of weights, at most W
    Vec<C, W> dots[W] = {};
    unroll<W>([&](auto k) SECATEUR_INLINE {
      if (k >= count) return;
      const C* const from = dy + s.index[p + k] * lanes;
      const auto w = broadcast<Vec<C, W>>(values[p + k]);
      unroll<NV>([&](auto v) SECATEUR_INLINE {
        const Vec<C, W> right = load<W>(from + v * W);
        acc[v] += w * right;
        dots[k] += held[v] * right;
      });
    });
    return sum_each<C, W>(dots);
  };
  for (; p + W <= end; p += W) {
    Vec<C, W> sum = group(std::integral_constant<int64_t, W>{});
    if (accumulate) sum += load<W>(sums + p);
    store<W>(sums + p, sum);
  }
  if (p < end) {
    Vec<C, W> sum = group(end - p);
    if (accumulate) sum += load_first<W>(sums + p, end - p);
    store_first<W>(sums + p, sum, end - p);
  }
  unroll<NV>([&](auto v) SECATEUR_INLINE { store<W>(dx + v * W, acc[v]); });
}

template <typename T>
void run_backward(const Args& g, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int W = kLanes<C>;
  const Side s = side_of(g);
  const int64_t lanes = g.plan.panel, panels = ceil_div(g.batch, lanes);
  const auto* const values = static_cast<const C*>(g.values_space);
  C* const sums = static_cast<C*>(g.sums);
  const auto* const x = static_cast<const C*>(g.x_space);
  const auto* const dy = static_cast<const C*>(g.dy_space);
  T* const dx = static_cast<T*>(g.out);
  alignas(64) C features[kFeatureChunk * kBatchLanes] = {};
  for (int64_t panel = 0; panel < panels; ++panel) {
    for_groups(s.ptr, s.lines, kFeatureChunk, begin, end, [&](int64_t, int64_t group) {
      const int64_t first = group * kFeatureChunk;
      const int64_t count = std::min(kFeatureChunk, s.lines - first);
      for (int64_t i = 0; i < count; ++i) {
        const C* const right = dy + panel * g.out_features * lanes;
        const C* const held = x + (panel * g.in_features + first + i) * lanes;
        bool accumulate = panel > 0 || !g.first_part;
        const auto run = [&](auto nv, int64_t v) {
          backward_tile<C, nv>(s, first + i, values, right + v, held + v, lanes, accumulate,
                               features + i * lanes + v, sums);
          accumulate = true;
        };
        int64_t v = 0;
        for (; v + kMaxVectors * W <= lanes; v += kMaxVectors * W)
          run(std::integral_constant<int, kMaxVectors>{}, v);
        for (; v < lanes; v += W) run(std::integral_constant<int, 1>{}, v);
      }
      const int64_t m = panel * lanes;
      store_transposed<W, T>(features, count, lanes, Epilogue<T>(g), first,
                             std::min(lanes, g.batch - m), dx + m * g.in_features + first,
                             g.in_features);
    });
  }
}

// dW of elements [begin, end) of its sums.
template <typename T>
void finish_sums(const Args& g, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int W = kLanes<C>;
  const auto* const sums = static_cast<const C*>(g.sums);
  const auto* const other = static_cast<const C*>(g.other_sums);
  T* const dw = static_cast<T*>(g.dw);
  int64_t i = begin;
  if (g.product == Product::Backward) {  // whose sums are in column order
    for (; i < end; ++i) {
      __builtin_prefetch(dw + g.position_t[std::min(i + kWeightsAhead, end - 1)], 1);
      dw[g.position_t[i]] = narrow<T>(other ? sums[i] + other[i] : sums[i]);
    }
    return;
  }
  for (; i + W <= end; i += W) {
    Vec<C, W> sum = load<W>(sums + i);
    if (other) sum += load<W>(other + i);
    store<W>(dw + i, sum);
  }
  for (; i < end; ++i) dw[i] = narrow<T>(other ? sums[i] + other[i] : sums[i]);
}

// ---------------------------------------------------------------- plans

// Lanes of the outer product: half a 512-bit vector still beats dot products.
template <typename C>
constexpr int kHalfLanes = kVectorBytes == 64 ? kLanes<C> / 2 : kLanes<C>;

Stage transposed_stage(int64_t batch, int64_t features, int64_t lanes) {
  const int64_t chunk = std::clamp<int64_t>(features, 1, kPackChunk);
  return {ceil_div(batch, lanes) * ceil_div(features, kPackChunk),
          std::max<int64_t>(1, kTaskMultiplies / 4 / (chunk * lanes))};
}
Stage panels_stage(int64_t batch, int64_t features) {
  return {batch, std::max<int64_t>(1, kTaskMultiplies / 4 / std::max<int64_t>(1, features))};
}

template <typename T>
Plan plan_for(const Args& g) {
  using C = Compute<T>;
  constexpr int W = kLanes<C>;
  constexpr bool kNarrow = !std::is_same_v<T, C>;
  constexpr int64_t kBytes = sizeof(C);
  const int64_t block_size = g.rows * g.cols;
  const int64_t values_bytes = g.n_blocks * block_size * kBytes;
  const bool few = g.batch < kFewRows;
  const bool forward = g.product == Product::Forward;
  const Side s = side_of(g);
  Plan plan{};
  // Lines of one vector would take a broadcast for each multiply-add, which 16 registers cannot
  // hide.
  const auto as_features = [&](int64_t line_width) {
    constexpr int64_t kNarrowest = kVectorRegisters == 32 ? W : 2 * W;
    return g.rows % W == 0 && g.cols % W == 0 && (few || line_width >= kNarrowest);
  };
  const bool by_lanes = !as_features(s.line_width) || (forward && few && g.batch > kDotRows);
  const bool outer = g.rows >= 4 && g.cols % kHalfLanes<C> == 0;
  // Pairs along features take two neighbours in memory, pairs along the batch any two rows.
  const auto even = [](const void* data, int64_t features, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 4 == 0 && features % 2 == 0 && stride % 2 == 0;
  };
  const auto in_pairs = [&] {
    switch (g.product) {
      case Product::Forward:
        return even(g.x, g.in_features, g.x_stride) && even(g.values, g.cols, 0) &&
               (by_lanes || !few);
      case Product::InputGradient:
        return even(g.dy, g.out_features, g.dy_stride) && g.rows % 2 == 0 && (by_lanes || !few);
      default:
        return g.product == Product::WeightGradient && outer && !few;
    }
  };
  plan.pairs = kHasPairs && std::is_same_v<T, BFloat16> && in_pairs();
  // Of what is packed: a pair is as large as a float.
  const int64_t batch =
      plan.pairs && g.product == Product::WeightGradient ? ceil_div(g.batch, 2) : g.batch;
  const auto packed_features = [&](int64_t features) {
    return plan.pairs && g.product != Product::WeightGradient ? features / 2 : features;
  };

  // One place for the space and the stage that a layout needs.
  const auto lay_out = [&](Layout layout, int64_t features, int64_t block, Layout& where,
                           int64_t& bytes, Stage& stage) {
    where = layout;
    if (layout == Layout::Panels) {
      bytes = ceil_div(features, block) * panel_row(block) * batch * kBytes;
      stage = panels_stage(batch, features);
    } else if (layout == Layout::Transposed) {
      bytes = ceil_div(batch, plan.panel) * plan.panel * packed_features(features) * kBytes;
      stage = transposed_stage(batch, packed_features(features), plan.panel);
    }
  };
  const auto lay_out_x = [&](Layout layout) {
    lay_out(layout, g.in_features, g.cols, plan.x, plan.x_bytes, plan.pack_x);
  };
  const auto lay_out_dy = [&](Layout layout) {
    lay_out(layout, g.out_features, g.rows, plan.dy, plan.dy_bytes, plan.pack_dy);
  };
  if (g.product == Product::WeightGradient || g.product == Product::Backward) {
    plan.sums_bytes = values_bytes;
    plan.sums_are_dw = !kNarrow && g.product == Product::WeightGradient;
    plan.finish = {g.n_blocks * block_size, kTaskMultiplies / 4};
  }
  const auto copy_values = [&] {
    plan.values_bytes = plan.pairs ? values_bytes / 2 : values_bytes;
    plan.pack_values = {g.n_blocks, std::max<int64_t>(1, kTaskMultiplies / 4 / block_size)};
  };

  const int64_t batch_lanes = g.batch > 2 * kFewLanes ? kBatchLanes : kFewLanes;
  // On 16 registers tiles of several rows take three vectors, and a panel that single weights
  // gather from had better stay in L2.
  const auto gather_lanes = [&](int64_t inner_features) {
    int64_t lanes = batch_lanes;
    if (kVectorRegisters == 32 || lanes == kFewLanes) return lanes;
    if (block_size > 1) return kFeaturePanel;
    while (lanes > kFewLanes && inner_features * lanes * kBytes > 1 << 17) lanes /= 2;
    return lanes;
  };
  if (g.product == Product::Backward) {
    plan.method = Method::Batch;
    plan.panel = gather_lanes(g.out_features);
    lay_out_x(Layout::Transposed);
    lay_out_dy(Layout::Transposed);
    plan.reorder_values = true;
    copy_values();
    plan.run = group_stage(g.col_ptr, g.block_cols, kFeatureChunk, 1, g.batch);
    return plan;
  }
  if (g.product == Product::WeightGradient) {
    if (outer) {
      plan.method = Method::Features;
      const bool shares_features = as_features(g.cols);  // with dX, which takes the same dY
      const Layout layout_of_dy = shares_features ? kFeatureLayout : Layout::Transposed;
      plan.panel = shares_features ? kFeaturePanel : gather_lanes(g.out_features);
      lay_out_x(!kNarrow && few && g.in_features % g.cols == 0 ? Layout::InPlace : Layout::Panels);
      lay_out_dy(!kNarrow && few ? Layout::InPlace : plan.pairs ? Layout::Panels : layout_of_dy);
      plan.run = {g.n_blocks, std::max<int64_t>(
                                  1, kTaskMultiplies / std::max<int64_t>(1, block_size * g.batch))};
    } else {
      plan.method = Method::Batch;
      plan.panel = batch_lanes;
      lay_out_x(Layout::Transposed);
      lay_out_dy(Layout::Transposed);
      plan.run = group_stage(g.row_ptr, g.block_rows, 1, 1, block_size * g.batch);
    }
    return plan;
  }

  const auto lay_out_left = [&](Layout layout) {
    forward ? lay_out_x(layout) : lay_out_dy(layout);
  };
  if (by_lanes) {
    plan.method = Method::Batch;
    plan.panel = g.batch <= kFewestLanes ? kFewestLanes : gather_lanes(s.inner_features);
    lay_out_left(Layout::Transposed);
    const bool copied = kNarrow && !(forward && plan.pairs);
    // In the other order each small block would cost a cache line of its own.
    plan.reorder_values = !forward && (copied || block_size <= kSmallBlock) && g.batch > kFewLanes;
    if (copied || plan.reorder_values) copy_values();
    plan.run = group_stage(s.ptr, s.lines, lines_per_group(s.line_width),
                           ceil_div(g.batch, plan.panel), block_size * plan.panel);
  } else if (forward && few) {
    plan.method = Method::Dots;
    plan.panel = g.batch;
    lay_out_x(kNarrow ? Layout::Panels : Layout::InPlace);
    plan.run = group_stage(s.ptr, s.lines, 1, 1, block_size * g.batch);
  } else {
    plan.method = Method::Features;
    plan.panel = kFeaturePanel;
    lay_out_left(few && !kNarrow ? Layout::InPlace : kFeatureLayout);
    plan.transpose_values = forward;
    plan.reorder_values = !forward && kVectorRegisters == 16 && g.rows_of_all >= kRowsToReorder;
    plan.stripes = forward || plan.reorder_values;
    if (plan.stripes || (kNarrow && !few)) copy_values();
    plan.run = group_stage(s.ptr, s.lines, 1, ceil_div(g.batch, kFeatureRows),
                           block_size * std::min(g.batch, kFeatureRows));
  }
  return plan;
}

template <typename T>
void pack_matrix(const Args& g, Layout layout, const void* data, int64_t stride,
                 const PackedFeatures& features, void* space, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (g.plan.pairs) {
      auto* const to = static_cast<uint32_t*>(space);
      if (layout == Layout::Panels)
        pack_paired_panels(static_cast<const T*>(data), stride, g.batch, features, to, begin, end);
      else
        for_lanes<uint32_t>(g.plan.panel, [&]<int W, int kMostLanes>() {
          pack_transposed<W>(static_cast<const uint32_t*>(data), stride / 2, g.batch,
                             {features.count / 2, features.width / 2, features.ptr}, g.plan.panel,
                             to, begin, end);
        });
      return;
    }
  }
  const auto* const from = static_cast<const T*>(data);
  auto* const to = static_cast<Compute<T>*>(space);
  if (layout == Layout::Panels)
    pack_panels<T>(from, stride, g.batch, features, to, begin, end);
  else
    for_lanes<Compute<T>>(g.plan.panel, [&]<int W, int kMostLanes>() {
      pack_transposed<W>(from, stride, g.batch, features, g.plan.panel, to, begin, end);
    });
}

// Calls f(NV, first, stripe) for each stripe of a block that is `width` wide and `inner` deep:
// columns [first, first + NV * W), which tiles of Features multiply at a time. They lie one after
// the other, so that a tile goes through memory without gaps.
template <int W, typename C, typename F>
inline void for_stripes(int64_t width, int64_t inner, C* block, F&& f) {
  for_vectors<W>(width, width,
                 [&](auto nv, int64_t first) { f(nv, first, block + first * inner); });
}

// A block (rows, cols) to stripes of its columns.
template <typename T>
void copy_stripes(const T* block, int64_t rows, int64_t cols, Compute<T>* to) {
  constexpr int W = kLanes<Compute<T>>;
  for_stripes<W>(cols, rows, to, [&](auto nv, int64_t first, Compute<T>* stripe) {
    for (int64_t i = 0; i < rows; ++i)
      unroll<nv>([&](auto v) SECATEUR_INLINE {
        store<W>(stripe + (i * nv + v) * W, load<W>(block + i * cols + first + v * W));
      });
  });
}

// Blocks (rows, cols) of E to stripes of their rows.
template <typename E>
void transpose_blocks(const E* from, int64_t rows, int64_t cols, Compute<E>* to, int64_t begin,
                      int64_t end) {
  using C = Compute<E>;
  constexpr int W = kLanes<C>;
  for (int64_t p = begin; p < end; ++p) {
    const E* const block = from + p * rows * cols;
    for_stripes<W>(rows, cols, to + p * rows * cols, [&](auto nv, int64_t first, C* stripe) {
      constexpr int64_t kWidth = nv * W;
      for (int64_t i = 0; i < kWidth; i += W) {
        for (int64_t j = 0; j < cols; j += W) {
          const E* const tile = block + (first + i) * cols + j;
          C* const place = stripe + j * kWidth + i;
          if (j + W <= cols)
            transpose_tile<W>(tile, cols, W, place, kWidth);
          else
            transpose_corner<W>(tile, cols, W, cols - j, place, kWidth);
        }
      }
    });
  }
}

template <typename T>
void pack_blocks(const Args& g, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const auto* const from = static_cast<const T*>(g.values);
  auto* const to = static_cast<C*>(g.values_space);
  const int64_t size = g.rows * g.cols;
  if (g.plan.transpose_values) {
    if constexpr (std::is_same_v<T, BFloat16>)
      if (g.plan.pairs)
        return transpose_blocks(static_cast<const uint32_t*>(g.values), g.rows, g.cols / 2,
                                static_cast<uint32_t*>(g.values_space), begin, end);
    return transpose_blocks(from, g.rows, g.cols, to, begin, end);
  }
  if (g.plan.reorder_values && size == 1) {
    for (int64_t q = begin; q < end; ++q) {
      __builtin_prefetch(from + g.position_t[std::min(q + kWeightsAhead, end - 1)]);
      to[q] = widen(from[g.position_t[q]]);
    }
    return;
  }
  if (!g.plan.reorder_values && !g.plan.pairs)
    return widen_range(from + begin * size, to + begin * size, (end - begin) * size);
  const auto source = [&](int64_t q) {
    return from + (g.plan.reorder_values ? g.position_t[q] : q) * size;
  };
  for (int64_t q = begin; q < end; ++q) {
    if (g.plan.reorder_values && q + kBlocksAhead < end)
      expect(source(q + kBlocksAhead), 0, 1, size);
    const T* const block = source(q);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (g.plan.pairs) {
        auto* const pairs = static_cast<uint32_t*>(g.values_space) + q * (size / 2);
        for (int64_t i = 0; i < g.rows; i += 2)
          pair_rows(block + i * g.cols, block + (i + 1) * g.cols, pairs + i / 2 * g.cols, g.cols);
        continue;
      }
    }
    if (g.plan.stripes)
      copy_stripes(block, g.rows, g.cols, to + q * size);
    else
      widen_range(block, to + q * size, size);
  }
}

template <typename T>
void run_for(const Args& g, int64_t begin, int64_t end) {
  using C = Compute<T>;
  if (g.product == Product::Backward) return run_backward<T>(g, begin, end);
  if (g.plan.method == Method::Batch) {
    if (g.product == Product::WeightGradient) return run_dot_weights<C>(g, begin, end);
    return for_lanes<C>(g.plan.panel, [&]<int W, int kMostLanes>() {
      if constexpr (kHasPairs && std::is_same_v<T, BFloat16>)
        if (g.plan.pairs) return run_batch<T, W, kMostLanes, uint32_t>(g, begin, end);
      run_batch<T, W, kMostLanes, C>(g, begin, end);
    });
  }
  if (g.plan.method == Method::Dots) return run_dots<T>(g, begin, end);
  if (g.product == Product::WeightGradient) {
    const auto outer = [&]<typename E>() {
      if (g.cols % kLanes<C> == 0) return run_outer<T, kLanes<C>, E>(g, begin, end);
      run_outer<T, kHalfLanes<C>, E>(g, begin, end);
    };
    if constexpr (kHasPairs && std::is_same_v<T, BFloat16>)
      if (g.plan.pairs) return outer.template operator()<uint32_t>();
    return outer.template operator()<C>();
  }
  if constexpr (std::is_same_v<T, C>)
    if (g.product == Product::InputGradient && g.plan.dy == Layout::InPlace)
      return run_features<T, Layout::InPlace>(g, static_cast<const T*>(g.values),
                                              static_cast<const T*>(g.dy), g.dy_stride, begin, end);
  const bool forward = g.product == Product::Forward;
  const void* const left = forward ? g.x_space : g.dy_space;
  const auto run = [&]<typename E>(const auto* blocks) {
    run_features<T, kFeatureLayout>(g, blocks, static_cast<const E*>(left),
                                    panel_row(forward ? g.cols : g.rows), begin, end);
  };
  if constexpr (kHasPairs && std::is_same_v<T, BFloat16>)
    if (g.plan.pairs)
      return run.template operator()<uint32_t>(static_cast<const uint32_t*>(g.values_space));
  if (g.values_space)
    run.template operator()<C>(static_cast<const C*>(g.values_space));
  else
    run.template operator()<C>(static_cast<const T*>(g.values));
}

// For the compiler `v` is another value from here on.
template <typename V>
SECATEUR_INLINE inline void make_opaque(V& v) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(v));
#else
  asm volatile("" : "+w"(v));
#endif
}

// E is as in add_products().
template <typename C, typename E>
int64_t multiply_registers_as(int64_t rounds, float* value) {
  constexpr int W = kLanes<C>, kChains = 12;  // more than the latency of a multiply-add hides
  auto factor = broadcast<Vec<E, W>>(static_cast<E>(*value));
  Vec<C, W> acc[kChains];
  for (int i = 0; i < kChains; ++i)  // alike, one chain would do for all
    acc[i] = broadcast<Vec<C, W>>(static_cast<C>(i));
  for (int64_t round = 0; round < rounds; ++round) {
    make_opaque(factor);  // or its square would be taken once, and only added
    unroll<kChains>(
        [&](auto i) SECATEUR_INLINE { acc[i] = multiply_add<C, W, E>(acc[i], factor, factor); });
  }
  for (const Vec<C, W>& v : acc) *value += static_cast<float>(v[0]);
  return rounds * kChains * W * (std::is_same_v<C, E> ? 2 : 4);
}

}  // namespace

int64_t multiply_registers(Dtype dtype, int64_t rounds, float* value) {
  return for_dtype(dtype, [&]<typename T>() {
    if constexpr (kHasPairs && std::is_same_v<T, BFloat16>)
      return multiply_registers_as<float, uint32_t>(rounds, value);
    else
      return multiply_registers_as<Compute<T>, Compute<T>>(rounds, value);
  });
}

Plan make_plan(const Args& args) {
  return for_dtype(args.dtype, [&]<typename T>() { return plan_for<T>(args); });
}

void pack_x(const Args& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&]<typename T>() {
    pack_matrix<T>(args, args.plan.x, args.x, args.x_stride,
                   {args.in_features, args.cols, args.col_ptr}, args.x_space, begin, end);
  });
}

void pack_dy(const Args& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&]<typename T>() {
    pack_matrix<T>(args, args.plan.dy, args.dy, args.dy_stride,
                   {args.out_features, args.rows, args.row_ptr}, args.dy_space, begin, end);
  });
}

void pack_values(const Args& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&]<typename T>() { pack_blocks<T>(args, begin, end); });
}

void run(const Args& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&]<typename T>() { run_for<T>(args, begin, end); });
}

void finish(const Args& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&]<typename T>() { finish_sums<T>(args, begin, end); });
}

}  // namespace secateur::block_sparse::SECATEUR_ISA
