#pragma once
// What the op of every device checks alike; for op.cpp and op_cuda.cpp.
#include <optional>
#include <string>

#include "common/score_inputs.h"
#include "common/torch.h"
#include "nm/nm.h"

namespace secateur::nm {

// All of a kernel's arguments but the mask.
inline Args checked_args(const Tensor& weight, const std::optional<Tensor>& grad,
                         const std::optional<Tensor>& state, const std::string& formula, int64_t n,
                         int64_t m, bool largest, double normalizer, int64_t seed) {
  STD_TORCH_CHECK(1 <= n && n <= m && m <= kMaxGroup,
                  "nm_mask: expected 1 <= n <= m <= ", kMaxGroup, ", got n = ", n, " and m = ", m);
  Args args{};
  args.mode = state ? Mode::State : Mode::Observe;
  const ScoreParams params{normalizer, 0, 0, static_cast<uint64_t>(seed)};
  args.inputs = score_inputs("nm_mask", weight, grad, state, args.mode, formula, params);
  args.wide = weight.scalar_type() == ScalarType::Double;
  args.largest = largest;
  args.numel = weight.numel();
  args.n_cols = args.numel == 0 || weight.dim() == 0 ? 1 : args.numel / weight.size(0);
  args.n = n;
  args.m = m;
  return args;
}

}  // namespace secateur::nm
