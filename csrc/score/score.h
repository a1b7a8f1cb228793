#pragma once
#include <cstdint>

#include "common/formula.h"
#include "common/isa.h"

namespace secateur::score {

// Scores of a weight seen as an n_rows x n_cols matrix, reduced to blocks of rows x cols elements;
// blocks at the edges hold what is there.
struct Args {
  ScoreInputs inputs;
  Mode mode;
  Reduce reduce;
  bool wide;  // computed in double, else in float
  int64_t n_rows, n_cols;
  int64_t rows, cols;
  void* out;  // (ceil(n_rows / rows), ceil(n_cols / cols)), contiguous; not used by observe()
};

// How the work divides: elements() takes ranges of elements (blocks of one element); blocks()
// takes ranges of task numbers, 0 to n_tasks(args).
using Tasks = int64_t(const Args& args);
using Run = void(const Args& args, int64_t begin, int64_t end);

SECATEUR_PER_ISA(Tasks n_tasks; Run elements; Run blocks; Run observe)

// On a CUDA stream; these return a cudaError_t.
namespace CUDA {

// Blocks of one element; with null args.out only the state of Mode::Update is written.
int elements(const Args& args, void* stream);

// How many numbers of working memory, as wide as the scores, blocks() needs.
int64_t workspace(const Args& args);
int blocks(const Args& args, void* workspace, void* stream);

}  // namespace CUDA

}  // namespace secateur::score
