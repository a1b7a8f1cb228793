#pragma once
// What the ops of every device check alike; for op.cpp and op_cuda.cpp.
#include <optional>
#include <string>

#include "common/score_inputs.h"
#include "common/torch.h"
#include "score/score.h"

namespace secateur::score {

// All of a kernel's arguments but the blocks and what is written there.
inline Args checked_args(const char* op, const Tensor& weight, const std::optional<Tensor>& grad,
                         const std::optional<Tensor>& state, Mode mode, const std::string& formula,
                         const ScoreParams& params) {
  Args args{};
  args.mode = mode;
  args.inputs = score_inputs(op, weight, grad, state, mode, formula, params);
  args.wide = weight.scalar_type() == ScalarType::Double;
  args.n_rows = weight.dim() == 0 ? 1 : weight.size(0);
  args.n_cols = 1;
  for (int64_t d = 1; d < weight.dim(); ++d) args.n_cols *= weight.size(d);
  return args;
}

inline Args score_args(const char* op, const Tensor& weight, const std::optional<Tensor>& grad,
                       const std::optional<Tensor>& state, const std::string& formula,
                       double normalizer, int64_t seed) {
  return checked_args(op, weight, grad, state, state ? Mode::State : Mode::Observe, formula,
                      {normalizer, 0, 0, static_cast<uint64_t>(seed)});
}

// Of an op that updates `state`.
inline Args update_args(const char* op, const Tensor& state, const Tensor& weight,
                        const std::optional<Tensor>& grad, const std::string& formula, double decay,
                        double gain, double normalizer) {
  return checked_args(op, weight, grad, state, Mode::Update, formula, {normalizer, decay, gain, 0});
}

inline void check_blocks(const char* op, Args& args, int64_t rows, int64_t cols,
                         const std::string& reduce) {
  STD_TORCH_CHECK(rows >= 1 && cols >= 1, op, ": expected a block of at least 1 x 1, got ", rows,
                  " x ", cols);
  args.rows = rows;
  args.cols = cols;
  args.reduce = parse_name<Reduce>(op, "reduce", kReduceNames, reduce);
}

// One score a block, not written yet; args.out points to it.
inline Tensor new_scores(const Tensor& weight, Args& args) {
  const int64_t rows = (args.n_rows + args.rows - 1) / args.rows;
  const int64_t cols = (args.n_cols + args.cols - 1) / args.cols;
  Tensor out = torch::stable::new_empty(weight, {rows, cols},
                                        args.wide ? ScalarType::Double : ScalarType::Float);
  args.out = out.mutable_data_ptr();
  return out;
}

// Whether every score is one element's, so that nothing is reduced.
inline bool by_elements(const Args& args) {
  return args.rows == 1 && args.cols == 1 && args.reduce != Reduce::L2;
}

}  // namespace secateur::score
