#include <optional>
#include <string>

#include "common/torch_cuda.h"
#include "score/checks.h"
#include "score/score.h"

namespace secateur::score {
namespace {

Tensor run(const char* op, Args args, const Tensor& weight, int64_t rows, int64_t cols,
           const std::string& reduce) {
  check_blocks(op, args, rows, cols, reduce);
  const Device device(weight);
  Tensor out = new_scores(weight, args);
  if (weight.numel() == 0) return out;
  if (by_elements(args)) {
    check_launch(op, CUDA::elements(args, device.stream()));
    return out;
  }
  Tensor columns = torch::stable::new_empty(out, {CUDA::workspace(args)});
  check_launch(op, CUDA::blocks(args, columns.mutable_data_ptr(), device.stream()));
  return out;
}

Tensor score_cuda(const Tensor& weight, std::optional<Tensor> grad, std::optional<Tensor> state,
                  std::string formula, int64_t rows, int64_t cols, std::string reduce,
                  double normalizer, int64_t seed) {
  const Args args = score_args("score", weight, grad, state, formula, normalizer, seed);
  return run("score", args, weight, rows, cols, reduce);
}

Tensor score_update_cuda(Tensor state, const Tensor& weight, std::optional<Tensor> grad,
                         std::string formula, double decay, double gain, int64_t rows, int64_t cols,
                         std::string reduce, double normalizer) {
  const Args args =
      update_args("score_update_", state, weight, grad, formula, decay, gain, normalizer);
  return run("score_update_", args, weight, rows, cols, reduce);
}

void observe_cuda(Tensor state, const Tensor& weight, std::optional<Tensor> grad,
                  std::string formula, double decay, double gain, double normalizer) {
  const Args args = update_args("observe_", state, weight, grad, formula, decay, gain, normalizer);
  if (weight.numel() == 0) return;
  const Device device(weight);
  check_launch("observe_", CUDA::elements(args, device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SECATEUR_CUDA_LIBRARY, SECATEUR_CUDA_KEY, m) {
  m.impl("score", TORCH_BOX(&score_cuda));
  m.impl("score_update_", TORCH_BOX(&score_update_cuda));
  m.impl("observe_", TORCH_BOX(&observe_cuda));
}

}  // namespace secateur::score
