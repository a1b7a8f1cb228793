#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/torch_cuda.h"
#include "topk/checks.h"
#include "topk/topk.h"

namespace secateur::topk {
namespace {

int64_t* numbers(Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

Tensor new_workspace(const Problem& problem, int64_t capacity, const Tensor& like) {
  return new_tensor(like, {CUDA::workspace_bytes(problem, capacity)}, ScalarType::Byte);
}

// The masks, and (index of the first weight with a bad score or -1, number of elements alive).
std::tuple<std::vector<Tensor>, Tensor> select_cuda(
    std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> states,
    std::string formula, std::vector<Tensor> alive, std::optional<int64_t> keep,
    std::optional<double> threshold, bool largest, bool finite, std::vector<double> normalizers,
    std::vector<int64_t> seeds) {
  // Checks
  auto [items, problem] = prepare(
      "select", {weights, grads, states, formula, alive, largest, finite, normalizers, seeds});
  set_goal(problem, keep, threshold);

  // Outputs
  const Device device(weights[0]);
  std::vector<Tensor> masks = new_masks(items, weights[0]);
  Tensor info = new_tensor(weights[0], {2}, ScalarType::Long);

  // Dispatch
  const int64_t capacity = CUDA::capacity(problem.numel);
  Tensor workspace = new_workspace(problem, capacity, weights[0]);
  check_launch("select", CUDA::select(problem, capacity, workspace.mutable_data_ptr(),
                                      numbers(info), device.stream()));
  return {masks, info};
}

// The bins, (keys above, keys inside) of each weight, and the same info.
std::tuple<Tensor, Tensor, Tensor> histogram_cuda(
    std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> states,
    std::string formula, std::vector<Tensor> alive, std::optional<int64_t> low,
    std::optional<int64_t> high, bool largest, std::vector<double> normalizers,
    std::vector<int64_t> seeds) {
  // Checks
  auto [items, problem] = prepare(
      "histogram", {weights, grads, states, formula, alive, largest, true, normalizers, seeds});

  // Outputs
  const Device device(weights[0]);
  Tensor bins = torch::stable::new_zeros(weights[0], {kBins}, ScalarType::Long);
  Tensor counts = new_counts(items, weights[0]);
  Tensor info = new_tensor(weights[0], {2}, ScalarType::Long);

  // Dispatch
  Tensor workspace = new_workspace(problem, 0, weights[0]);
  check_launch(
      "histogram",
      CUDA::histogram(problem, low.value_or(std::numeric_limits<int64_t>::min()),
                      high.value_or(std::numeric_limits<int64_t>::max()),
                      workspace.mutable_data_ptr(), numbers(bins), numbers(info), device.stream()));
  return {bins, counts, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SECATEUR_CUDA_LIBRARY, SECATEUR_CUDA_KEY, m) {
  m.impl("select", TORCH_BOX(&select_cuda));
  m.impl("histogram", TORCH_BOX(&histogram_cuda));
}

}  // namespace secateur::topk
