#include <optional>
#include <string>
#include <vector>

#include "common/torch_cuda.h"
#include "score/checks.h"
#include "score/score.h"

namespace secateur::score {
namespace {

// `like` is on their device.
void run(const char* op, const std::vector<Args>& tensors, const Tensor& like) {
  if (tensors.empty()) return;
  const Device device(like);
  const auto count = static_cast<int64_t>(tensors.size());
  Tensor workspace =
      new_tensor(like, {CUDA::workspace_bytes(tensors.data(), count)}, ScalarType::Byte);
  check_launch(op, CUDA::run(tensors.data(), count, workspace.mutable_data_ptr(), device.stream()));
}

std::vector<Tensor> score_cuda(std::vector<Tensor> weights, std::vector<Tensor> grads,
                               std::vector<Tensor> states, std::string formula,
                               std::vector<int64_t> rows, std::vector<int64_t> cols,
                               std::string reduce, std::vector<double> normalizers,
                               std::vector<int64_t> seeds) {
  const Prepared prepared =
      prepare_score(weights, grads, states, formula, rows, cols, reduce, normalizers, seeds);
  run("score", prepared.tensors, weights[0]);
  return prepared.scores;
}

Tensor score_update_cuda(Tensor state, const Tensor& weight, std::optional<Tensor> grad,
                         std::string formula, double decay, double gain, int64_t rows, int64_t cols,
                         std::string reduce, double normalizer) {
  const Prepared prepared =
      prepare_update(state, weight, grad, formula, decay, gain, rows, cols, reduce, normalizer);
  run("score_update_", prepared.tensors, weight);
  return prepared.scores[0];
}

void observe_cuda(Tensor state, const Tensor& weight, std::optional<Tensor> grad,
                  std::string formula, double decay, double gain, double normalizer) {
  const Args args = update_args("observe_", state, weight, grad, formula, decay, gain, normalizer);
  if (weight.numel() > 0) run("observe_", {args}, weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SECATEUR_CUDA_LIBRARY, SECATEUR_CUDA_KEY, m) {
  m.impl("score", TORCH_BOX(&score_cuda));
  m.impl("score_update_", TORCH_BOX(&score_update_cuda));
  m.impl("observe_", TORCH_BOX(&observe_cuda));
}

}  // namespace secateur::score
