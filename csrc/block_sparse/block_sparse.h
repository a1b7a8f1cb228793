#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace secateur::block_sparse {

// W (out_features, in_features) is cut into blocks of (rows, cols); blocks that stick out over the
// edge are stored whole, and no kernel reads or lets through what lies outside of the matrix.
enum class Product : int32_t {
  Forward,         // Y = X W^T + bias            x, values, bias -> out (batch, out_features)
  InputGradient,   // dX = dY W                   dy, values      -> out (batch, in_features)
  WeightGradient,  // dW = dY^T X, live blocks    dy, x           -> out (n_blocks, rows, cols)
  Backward,        // both of single weights      dy, x, values   -> out as of dX, dw as of dW
};

constexpr int64_t kBatchLanes = 64;  // the most rows of the batch in one transposed panel

// How a matrix (batch, features) is laid out for the kernel. Where bfloat16 is paired, Panels hold
// pairs of rows and Transposed pairs of features.
enum class Layout : int32_t {
  InPlace,  // as given
  Panels,   // [features / block][batch][panel_row(block) of cpu.cpp], zero beyond the last feature
  Transposed,  // [batch / panel][features][panel], zero beyond the last row
};

// Which loop runs over the vector lanes; see cpu.cpp.
enum class Method : int32_t { Features, Dots, Batch };

enum class Activation : int32_t { None, Relu, Gelu };

// One parallel step of an op; `grain` items are worth a thread.
struct Stage {
  int64_t items = 0;
  int64_t grain = 1;
};

struct Plan {
  Method method;
  Layout x = Layout::InPlace;
  Layout dy = Layout::InPlace;
  bool transpose_values = false;  // each block, in values_space
  bool reorder_values = false;    // blocks in column order, in values_space
  bool stripes = false;           // what is in values_space: as for_stripes() of cpu.cpp has it
  bool pairs = false;  // bfloat16 is multiplied in pairs along the inner dimension, not widened
  int64_t panel;       // lanes of Layout::Transposed
  int64_t x_bytes = 0, dy_bytes = 0, values_bytes = 0, sums_bytes = 0;  // workspaces; 0: none
  bool sums_are_dw = false;  // where there is one sum of dW only, it may be the result itself
  Stage pack_x, pack_dy, pack_values, run, finish;
};

// One product, on any device; what it does not take is null or 0.
struct Problem {
  Product product;
  Dtype dtype;
  int64_t batch, out_features, in_features;
  int64_t rows, cols, block_rows, block_cols, n_blocks;
  // Row order: block p lies at block row row_of[p], block column col[p]; row r owns
  // [row_ptr[r], row_ptr[r + 1]), its columns ascending. Column order: the q-th block lies at block
  // row row_t[q] and is block position_t[q] of the row order.
  const int32_t *row_ptr, *col, *row_of, *col_ptr, *row_t, *position_t;
  // Unit stride along features; strides in elements from one row of the batch to the next.
  const void* x;
  int64_t x_stride;
  const void* dy;
  int64_t dy_stride;
  const void* values;
  const void* bias;       // may be null
  Activation activation;  // of Forward
  void* out;              // Y or dX, contiguous
  void* dw;               // of WeightGradient and Backward, contiguous
};

// What the CPU kernels take.
struct Args : Problem {
  // The rows of a batch come in parts: values are packed with the first, which also starts the sums
  // of dW, in the dtype that is computed in. finish() adds the other sums, if any, and writes dW.
  bool first_part;
  int64_t rows_of_all;  // parts
  Plan plan;
  void *x_space, *dy_space, *values_space, *sums;
  const void* other_sums;  // may be null
};

using MakePlan = Plan(const Args& args);
using RunStage = void(const Args& args, int64_t begin, int64_t end);

// A ceiling for benchmarks: multiply-adds of what stays in registers, on one thread. Returns how
// many floating-point operations `rounds` of them are; *value, 0, is what they start from.
using Ceiling = int64_t(Dtype dtype, int64_t rounds, float* value);

SECATEUR_PER_ISA(MakePlan make_plan; RunStage pack_x; RunStage pack_dy; RunStage pack_values;
                 RunStage run; RunStage finish; Ceiling multiply_registers)

// Products on CUDA, but for Backward, which is two of them there. The batch and the result are not
// empty, and there are fewer than 2**31 features in blocks.
namespace CUDA {

// Bytes that a product needs beside its operands.
int64_t workspace_bytes(const Problem& problem);
// On a CUDA stream; returns a cudaError_t. `workspace` is aligned to 16 bytes.
int run(const Problem& problem, void* workspace, void* stream);

}  // namespace CUDA
}  // namespace secateur::block_sparse
