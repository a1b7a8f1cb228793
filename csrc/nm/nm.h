#pragma once
#include <cstdint>

#include "common/formula.h"
#include "common/isa.h"

namespace secateur::nm {

// Elements of one unit of work; a multiple of 64, so that units write whole bytes of the mask.
constexpr int64_t kUnit = 4096;
constexpr int64_t kMaxGroup = 64;

// A weight seen as a matrix with n_cols columns; every row is cut into groups of m neighbours, the
// last of which may be shorter, and the n best of each group are kept.
struct Args {
  ScoreInputs inputs;
  Mode mode;
  bool wide;     // scores are double, else float
  bool largest;  // whether larger scores are better
  int64_t numel, n_cols;
  int64_t n, m;   // 1 <= n <= m <= kMaxGroup
  uint8_t* mask;  // bit-packed, written
};

// Takes a range of units, 0 to ceil(numel / kUnit); whether some score is NaN or infinite.
using Run = bool(const Args& args, int64_t begin, int64_t end);

SECATEUR_PER_ISA(Run run)

namespace CUDA {

// On a CUDA stream; returns a cudaError_t. *bad, zero before, becomes 1 if some score is NaN or
// infinite.
int run(const Args& args, uint32_t* bad, void* stream);

}  // namespace CUDA

}  // namespace secateur::nm
