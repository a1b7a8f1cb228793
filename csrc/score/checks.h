#pragma once
// What the ops of every device check alike; for op.cpp and op_cuda.cpp.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/score_inputs.h"
#include "common/torch.h"
#include "score/score.h"

namespace secateur::score {

// All of a kernel's arguments but where scores are written, by blocks of one element.
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
  args.rows = args.cols = 1;
  return args;
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
  // Blocks do not go beyond the matrix.
  args.rows = std::min(rows, std::max<int64_t>(args.n_rows, 1));
  args.cols = std::min(cols, std::max<int64_t>(args.n_cols, 1));
  args.reduce = parse_name<Reduce>(op, "reduce", kReduceNames, reduce);
}

// One score a block, not written yet; args.out points to it.
inline Tensor new_scores(const Tensor& weight, Args& args) {
  const int64_t rows = (args.n_rows + args.rows - 1) / args.rows;
  const int64_t cols = (args.n_cols + args.cols - 1) / args.cols;
  Tensor out = new_tensor(weight, {rows, cols}, args.wide ? ScalarType::Double : ScalarType::Float);
  args.out = out.mutable_data_ptr();
  return out;
}

// What is written, and the arguments of those tensors that have elements.
struct Prepared {
  std::vector<Tensor> scores;
  std::vector<Args> tensors;
};

// Of `args` as checked so far.
inline void add_scores(const char* op, Prepared& prepared, Args args, const Tensor& weight,
                       int64_t rows, int64_t cols, const std::string& reduce) {
  check_blocks(op, args, rows, cols, reduce);
  prepared.scores.push_back(new_scores(weight, args));
  if (weight.numel() > 0) prepared.tensors.push_back(args);
}

inline Prepared prepare_score(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                              const std::vector<Tensor>& states, const std::string& formula,
                              const std::vector<int64_t>& rows, const std::vector<int64_t>& cols,
                              const std::string& reduce, const std::vector<double>& normalizers,
                              const std::vector<int64_t>& seeds) {
  constexpr const char* op = "score";
  const size_t n = weights.size();
  STD_TORCH_CHECK(n > 0, op, ": expected at least one weight, got none");
  check_length(op, "grads", grads.size(), n, false);
  check_length(op, "states", states.size(), n, false);
  check_length(op, "rows", rows.size(), n, true);
  check_length(op, "cols", cols.size(), n, true);
  check_length(op, "normalizers", normalizers.size(), n, true);
  check_length(op, "seeds", seeds.size(), n, true);
  const Mode mode = states.empty() ? Mode::Observe : Mode::State;
  Prepared prepared;
  for (size_t i = 0; i < n; ++i) {
    check_device(op, weights, i);
    const ScoreParams params{normalizers[i], 0, 0, static_cast<uint64_t>(seeds[i])};
    const Args args =
        checked_args(op, weights[i], at(grads, i), at(states, i), mode, formula, params);
    add_scores(op, prepared, args, weights[i], rows[i], cols[i], reduce);
  }
  return prepared;
}

inline Prepared prepare_update(const Tensor& state, const Tensor& weight,
                               const std::optional<Tensor>& grad, const std::string& formula,
                               double decay, double gain, int64_t rows, int64_t cols,
                               const std::string& reduce, double normalizer) {
  constexpr const char* op = "score_update_";
  Prepared prepared;
  add_scores(op, prepared, update_args(op, state, weight, grad, formula, decay, gain, normalizer),
             weight, rows, cols, reduce);
  return prepared;
}

}  // namespace secateur::score
