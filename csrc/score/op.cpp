#include <optional>
#include <string>

#include "common/torch.h"
#include "score/checks.h"
#include "score/score.h"

namespace secateur::score {
namespace {

constexpr int64_t kGrainElements = 16384;

// Blocks of one task hold about rows x 1024 elements; a thread takes at least a grain of elements.
int64_t grain_tasks(const Args& args, int64_t tasks) {
  return 1 + tasks * kGrainElements / (args.n_rows * args.n_cols);
}

Tensor run(const char* op, Args args, const Tensor& weight, int64_t rows, int64_t cols,
           const std::string& reduce) {
  // Checks
  check_blocks(op, args, rows, cols, reduce);

  // Outputs
  Tensor out = new_scores(weight, args);
  if (weight.numel() == 0) return out;

  // Dispatch
  if (by_elements(args)) {
    Run* kernel = SECATEUR_FOR_ISA(elements);
    torch::stable::parallel_for(0, weight.numel(), kGrainElements,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return out;
  }
  const int64_t tasks = SECATEUR_FOR_ISA(n_tasks)(args);
  Run* kernel = SECATEUR_FOR_ISA(blocks);
  torch::stable::parallel_for(0, tasks, grain_tasks(args, tasks),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor score_cpu(const Tensor& weight, std::optional<Tensor> grad, std::optional<Tensor> state,
                 std::string formula, int64_t rows, int64_t cols, std::string reduce,
                 double normalizer, int64_t seed) {
  const Args args = score_args("score", weight, grad, state, formula, normalizer, seed);
  return run("score", args, weight, rows, cols, reduce);
}

Tensor score_update_cpu(Tensor state, const Tensor& weight, std::optional<Tensor> grad,
                        std::string formula, double decay, double gain, int64_t rows, int64_t cols,
                        std::string reduce, double normalizer) {
  const Args args =
      update_args("score_update_", state, weight, grad, formula, decay, gain, normalizer);
  return run("score_update_", args, weight, rows, cols, reduce);
}

void observe_cpu(Tensor state, const Tensor& weight, std::optional<Tensor> grad,
                 std::string formula, double decay, double gain, double normalizer) {
  const Args args = update_args("observe_", state, weight, grad, formula, decay, gain, normalizer);
  if (weight.numel() == 0) return;
  Run* kernel = SECATEUR_FOR_ISA(observe);
  torch::stable::parallel_for(0, weight.numel(), kGrainElements,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "score(Tensor weight, Tensor? grad, Tensor? state, str formula, int rows, int cols, "
      "str reduce, float normalizer, int seed) -> Tensor");
  m.def(
      "score_update_(Tensor(a!) state, Tensor weight, Tensor? grad, str formula, float decay, "
      "float gain, int rows, int cols, str reduce, float normalizer) -> Tensor");
  m.def(
      "observe_(Tensor(a!) state, Tensor weight, Tensor? grad, str formula, float decay, "
      "float gain, float normalizer) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("score", TORCH_BOX(&score_cpu));
  m.impl("score_update_", TORCH_BOX(&score_update_cpu));
  m.impl("observe_", TORCH_BOX(&observe_cpu));
}

}  // namespace secateur::score
