#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/torch.h"
#include "topk/checks.h"
#include "topk/topk.h"

namespace secateur::topk {
namespace {

constexpr int64_t kGrainTasks = 4;
constexpr int64_t kGrainSamples = 512;

void run_step(Search& search) {
  Run* const step = SECATEUR_FOR_ISA(run);
  for_pieces(search.n_tasks, search.step == Step::Sample ? kGrainSamples : kGrainTasks,
             [&](int64_t begin, int64_t end) { step(search, begin, end); });
}

// (index of the first weight with a bad score or -1, number of elements alive)
Tensor info_of(const Search& search, const Tensor& like) {
  Tensor info = new_tensor(like, {2}, ScalarType::Long);
  int64_t* const result = static_cast<int64_t*>(info.mutable_data_ptr());
  result[0] = search.bad_item < search.n_items ? search.bad_item : -1;
  result[1] = search.alive;
  return info;
}

// The masks, and info_of().
std::tuple<std::vector<Tensor>, Tensor> select_cpu(
    std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> states,
    std::string formula, std::vector<Tensor> alive, std::optional<int64_t> keep,
    std::optional<double> threshold, bool largest, bool finite, std::vector<double> normalizers,
    std::vector<int64_t> seeds) {
  // Checks
  auto [items, problem] = prepare(
      "select", {weights, grads, states, formula, alive, largest, finite, normalizers, seeds});
  set_goal(problem, keep, threshold);

  // Outputs
  std::vector<Tensor> masks = new_masks(items, weights[0]);

  // Dispatch
  const auto search = std::make_unique<Search>();
  static_cast<Problem&>(*search) = problem;
  search->capacity = SECATEUR_FOR_ISA(capacity)(search->numel);
  const auto candidates = std::make_unique_for_overwrite<Candidates[]>(search->n_chunks);
  const auto keys = std::make_unique_for_overwrite<int64_t[]>(
      search->wide ? search->capacity : (search->capacity + 1) / 2);
  const auto offsets = std::make_unique_for_overwrite<uint16_t[]>(search->capacity);
  search->candidates = candidates.get();
  search->keys = keys.get();
  search->offsets = offsets.get();
  const DenormalsKept denormals;
  SECATEUR_FOR_ISA(start)(*search);
  if (search->step == Step::Done)  // more are to be kept than there are: masks of none
    for (const Item& item : items) std::fill_n(item.mask, (item.numel + 7) / 8, uint8_t{0});
  while (search->step != Step::Done) {
    run_step(*search);
    SECATEUR_FOR_ISA(advance)(*search);
  }
  return {masks, info_of(*search, weights[0])};
}

// The bins, (keys above, keys inside) of each weight, and info_of().
std::tuple<Tensor, Tensor, Tensor> histogram_cpu(
    std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> states,
    std::string formula, std::vector<Tensor> alive, std::optional<int64_t> low,
    std::optional<int64_t> high, bool largest, std::vector<double> normalizers,
    std::vector<int64_t> seeds) {
  // Checks
  auto [items, problem] = prepare(
      "histogram", {weights, grads, states, formula, alive, largest, true, normalizers, seeds});

  // Outputs
  Tensor bins = new_tensor(weights[0], {kBins}, ScalarType::Long);
  Tensor counts = new_counts(items, weights[0]);

  // Dispatch
  const auto search = std::make_unique<Search>();
  static_cast<Problem&>(*search) = problem;
  search->low = low.value_or(std::numeric_limits<int64_t>::min());
  search->high = high.value_or(std::numeric_limits<int64_t>::max());
  SECATEUR_FOR_ISA(start_histogram)(*search);
  run_step(*search);
  std::copy_n(search->histogram, kBins, static_cast<int64_t*>(bins.mutable_data_ptr()));
  return {bins, counts, info_of(*search, weights[0])};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "select(Tensor[] weights, Tensor[] grads, Tensor[] states, str formula, Tensor[] alive, "
      "int? keep, float? threshold, bool largest, bool finite, float[] normalizers, int[] seeds) "
      "-> (Tensor[], Tensor)");
  m.def(
      "histogram(Tensor[] weights, Tensor[] grads, Tensor[] states, str formula, Tensor[] alive, "
      "int? low, int? high, bool largest, float[] normalizers, int[] seeds) "
      "-> (Tensor bins, Tensor counts, Tensor info)");
}
STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("select", TORCH_BOX(&select_cpu));
  m.impl("histogram", TORCH_BOX(&histogram_cpu));
}

}  // namespace secateur::topk
