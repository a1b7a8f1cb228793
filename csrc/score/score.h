#pragma once
#include <cstdint>

#include "common/formula.h"
#include "common/isa.h"

namespace secateur::score {

// Scores of a weight seen as an n_rows x n_cols matrix, reduced to blocks of rows x cols elements,
// no larger than the matrix; blocks at the edges hold what is there.
struct Args {
  ScoreInputs inputs;
  Mode mode;
  Reduce reduce;
  bool wide;  // computed in double, else in float
  int64_t n_rows, n_cols;
  int64_t rows, cols;
  void* out;  // (ceil(n_rows / rows), ceil(n_cols / cols)), contiguous; not used by observe()
};

namespace {

// Whether every score is one element's, so that nothing is reduced.
constexpr bool by_elements(const Args& args) {
  return args.rows == 1 && args.cols == 1 && args.reduce != Reduce::L2;
}

}  // namespace

// How the work divides: elements() takes ranges of elements (blocks of one element); blocks()
// takes ranges of task numbers, 0 to n_tasks(args).
using Tasks = int64_t(const Args& args);
using Run = void(const Args& args, int64_t begin, int64_t end);

SECATEUR_PER_ISA(Tasks n_tasks; Run elements; Run blocks; Run observe)

// On a CUDA stream, `count` tensors that have elements; with null out, which wants blocks of one
// element, only the state of Mode::Update is written. Returns a cudaError_t.
namespace CUDA {

// The device memory that run() needs, aligned to 16 bytes.
int64_t workspace_bytes(const Args* tensors, int64_t count);
int run(const Args* tensors, int64_t count, void* workspace, void* stream);

}  // namespace CUDA

}  // namespace secateur::score
