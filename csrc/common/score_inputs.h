#pragma once
// From tensors and names to what the score kernels take; for op.cpp files.
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "common/formula.h"
#include "common/torch.h"

namespace secateur {

// The enumerator whose name is `name`.
template <typename Enum, size_t N>
Enum parse_name(const char* op, const char* argument, const char* const (&names)[N],
                const std::string& name) {
  std::string expected;
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
    expected += (i ? ", " : "") + std::string(names[i]);
  }
  STD_TORCH_CHECK(false, op, ": expected ", argument, " to be one of ", expected, ", got '", name,
                  "'");
  return Enum{};
}

// What a list that may be empty has for the i-th weight.
template <typename T>
std::optional<T> at(const std::vector<T>& list, size_t i) {
  return list.empty() ? std::nullopt : std::optional<T>(list[i]);
}

inline void check_length(const char* op, const char* name, size_t length, size_t expected,
                         bool required) {
  STD_TORCH_CHECK(length == expected || (length == 0 && !required), op, ": expected ", expected,
                  " ", name, ", one a weight, got ", length);
}

inline void check_device(const char* op, const std::vector<Tensor>& weights, size_t i) {
  STD_TORCH_CHECK(weights[i].device() == weights[0].device(), op,
                  ": expected weights on one device, got weights[", i,
                  "] on another one than weights[0]");
}

inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& weight,
                       ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": expected ", argument, " to be ", dtype, ", got ",
                  t.scalar_type());
  STD_TORCH_CHECK(t.device() == weight.device(), op, ": expected ", argument,
                  " to be on the weight's device");
  bool same = t.dim() == weight.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == weight.size(d);
  STD_TORCH_CHECK(same, op, ": expected ", argument, " to have the weight's shape");
}

// Checks that the formula has what it needs; the rest is left out of the views.
inline ScoreInputs score_inputs(const char* op, const Tensor& weight,
                                const std::optional<Tensor>& grad,
                                const std::optional<Tensor>& state, Mode mode,
                                const std::string& formula, const ScoreParams& params) {
  ScoreInputs in{};
  in.formula = parse_name<Formula>(op, "formula", kFormulaNames, formula);
  in.params = params;
  const ScalarType dtype = weight.scalar_type();
  const View view = view_of(weight, op, "weight");
  if (needs_weight(in.formula, mode)) in.weight = view;
  // Of one that is not read the device counts all the same: it may have chosen the kernel.
  STD_TORCH_CHECK(!grad || grad->device() == weight.device(), op,
                  ": expected grad to be on the weight's device");
  if (needs_grad(in.formula, mode)) {
    STD_TORCH_CHECK(grad.has_value(), op, ": expected a grad for formula '", formula, "'");
    check_like(op, "grad", *grad, weight, dtype);
    in.grad = view_of(*grad, op, "grad");
  }
  if (mode != Mode::Observe) {
    check_like(op, "state", *state, weight,
               dtype == ScalarType::Double ? dtype : ScalarType::Float);
    in.state =
        mode == Mode::Update ? mutable_view_of(*state, op, "state") : view_of(*state, op, "state");
  }
  return in;
}

}  // namespace secateur
