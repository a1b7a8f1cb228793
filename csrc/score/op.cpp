#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/torch.h"
#include "score/checks.h"
#include "score/score.h"

namespace secateur::score {
namespace {

constexpr int64_t kGrainElements = 16384;

// One loop over the elements of all tensors: to start the threads takes as long as a small one.
void run(const Prepared& prepared) {
  const std::vector<Args>& tensors = prepared.tensors;
  if (tensors.empty()) return;
  for (const Tensor& scores : prepared.scores)
    prefer_huge_pages(scores.mutable_data_ptr(), scores.numel() * scores.element_size());
  std::vector<Run*> kernels;
  std::vector<int64_t> per_task;  // elements; a task begins with its first
  std::vector<int64_t> first{0};
  for (const Args& args : tensors) {
    const int64_t numel = args.n_rows * args.n_cols;
    const int64_t tasks = by_elements(args) ? numel : SECATEUR_FOR_ISA(n_tasks)(args);
    kernels.push_back(by_elements(args) ? SECATEUR_FOR_ISA(elements) : SECATEUR_FOR_ISA(blocks));
    per_task.push_back((numel + tasks - 1) / tasks);
    first.push_back(first.back() + tasks * per_task.back());
  }
  for_pieces(first.back(), kGrainElements, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; begin = first[++i]) {
      const auto task_from = [&](int64_t element) {
        return (element - first[i] + per_task[i] - 1) / per_task[i];
      };
      kernels[i](tensors[i], task_from(begin), task_from(std::min(end, first[i + 1])));
    }
  });
}

std::vector<Tensor> score_cpu(std::vector<Tensor> weights, std::vector<Tensor> grads,
                              std::vector<Tensor> states, std::string formula,
                              std::vector<int64_t> rows, std::vector<int64_t> cols,
                              std::string reduce, std::vector<double> normalizers,
                              std::vector<int64_t> seeds) {
  const Prepared prepared =
      prepare_score(weights, grads, states, formula, rows, cols, reduce, normalizers, seeds);
  run(prepared);
  return prepared.scores;
}

Tensor score_update_cpu(Tensor state, const Tensor& weight, std::optional<Tensor> grad,
                        std::string formula, double decay, double gain, int64_t rows, int64_t cols,
                        std::string reduce, double normalizer) {
  const Prepared prepared =
      prepare_update(state, weight, grad, formula, decay, gain, rows, cols, reduce, normalizer);
  run(prepared);
  return prepared.scores[0];
}

void observe_cpu(Tensor state, const Tensor& weight, std::optional<Tensor> grad,
                 std::string formula, double decay, double gain, double normalizer) {
  const Args args = update_args("observe_", state, weight, grad, formula, decay, gain, normalizer);
  if (weight.numel() == 0) return;
  Run* kernel = SECATEUR_FOR_ISA(observe);
  for_pieces(weight.numel(), kGrainElements,
             [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "score(Tensor[] weights, Tensor[] grads, Tensor[] states, str formula, int[] rows, "
      "int[] cols, str reduce, float[] normalizers, int[] seeds) -> Tensor[]");
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
