#pragma once
// The names and inputs of score formulas; their definition is common/score.h. No torch here.
#include <cstdint>

#include "common/view.h"

namespace secateur {

enum class Formula : int32_t {
  Given,
  Magnitude,
  Gradient,
  Taylor,
  TaylorSquared,
  HessianDiagonal,
  Obd,
  Entropy,
  Movement,
  Random,
};
constexpr const char* kFormulaNames[] = {
    "given", "magnitude", "gradient", "taylor", "taylor_squared", "hessian_diagonal",
    "obd",   "entropy",   "movement", "random",
};

// Where x, what finish() makes the score of, comes from.
enum class Mode : int32_t {
  Observe,  // x = observe(w, g)
  State,    // x = state / normalizer
  Update,   // state <- decay * state + gain * observe(w, g); x = state
};

enum class Reduce : int32_t { Sum, Mean, Max, L2 };
constexpr const char* kReduceNames[] = {"sum", "mean", "max", "l2"};

constexpr bool observes_weight(Formula f) {
  return f != Formula::Gradient && f != Formula::HessianDiagonal && f != Formula::Obd &&
         f != Formula::Random;
}
constexpr bool observes_grad(Formula f) {
  return f == Formula::Gradient || f == Formula::Taylor || f == Formula::TaylorSquared ||
         f == Formula::HessianDiagonal || f == Formula::Obd || f == Formula::Movement;
}
constexpr bool needs_weight(Formula f, Mode mode) {
  return f == Formula::Obd || (mode != Mode::State && observes_weight(f));
}
constexpr bool needs_grad(Formula f, Mode mode) { return mode != Mode::State && observes_grad(f); }

struct ScoreParams {
  double normalizer;
  double decay;
  double gain;
  uint64_t seed;
};

// The inputs of one tensor's scores; a view that the formula does not need has null data.
struct ScoreInputs {
  View weight, grad, state;
  Formula formula;
  ScoreParams params;
};

}  // namespace secateur
