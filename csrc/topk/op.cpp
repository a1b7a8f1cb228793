#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/score_inputs.h"
#include "common/torch.h"
#include "topk/topk.h"

namespace secateur::topk {
namespace {

constexpr int64_t kGrainTasks = 4;
constexpr int64_t kGrainSamples = 512;

template <typename T>
std::optional<T> at(const std::vector<T>& list, size_t i) {
  return list.empty() ? std::nullopt : std::optional<T>(list[i]);
}

void check_length(const char* op, const char* name, size_t length, size_t expected, bool required) {
  STD_TORCH_CHECK(length == expected || (length == 0 && !required), op, ": expected ", expected,
                  " ", name, ", one a weight, got ", length);
}

const uint8_t* alive_bits(const char* op, const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Byte && t.is_contiguous() && t.numel() == (numel + 7) / 8, op,
      ": expected ", (numel + 7) / 8, " contiguous bytes (uint8) of alive mask for ", numel,
      " elements, got ", t.scalar_type(), " of ", t.numel());
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

// What every op here is told: what to score, what of it is alive, what is better.
struct Problem {
  std::vector<Tensor> weights, grads, states;
  std::string formula;
  std::vector<Tensor> alive;
  bool largest, finite;
  std::vector<double> normalizers;
  std::vector<int64_t> seeds;
};

// A search with its memory: items without outputs, and nothing of what is looked for.
struct Prepared {
  std::vector<Item> items;
  std::unique_ptr<Search> search;
};

Prepared prepare(const char* op, const Problem& p) {
  // Checks
  STD_TORCH_CHECK(!p.weights.empty(), op, ": expected at least one weight, got none");
  check_length(op, "grads", p.grads.size(), p.weights.size(), false);
  check_length(op, "states", p.states.size(), p.weights.size(), false);
  check_length(op, "alive masks", p.alive.size(), p.weights.size(), false);
  check_length(op, "normalizers", p.normalizers.size(), p.weights.size(), true);
  check_length(op, "seeds", p.seeds.size(), p.weights.size(), true);

  Prepared prepared{std::vector<Item>(p.weights.size()), std::make_unique<Search>()};
  Search& search = *prepared.search;
  search.mode = p.states.empty() ? Mode::Observe : Mode::State;
  search.wide = p.weights[0].scalar_type() == ScalarType::Double;
  search.largest = p.largest;
  search.finite = p.finite;
  for (size_t i = 0; i < p.weights.size(); ++i) {
    const Tensor& weight = p.weights[i];
    STD_TORCH_CHECK((weight.scalar_type() == ScalarType::Double) == search.wide, op,
                    ": expected weights that are all float64 or none, got ",
                    p.weights[0].scalar_type(), " and ", weight.scalar_type());
    Item& item = prepared.items[i];
    const ScoreParams params{p.normalizers[i], 0, 0, static_cast<uint64_t>(p.seeds[i])};
    item.inputs =
        score_inputs(op, weight, at(p.grads, i), at(p.states, i), search.mode, p.formula, params);
    item.numel = weight.numel();
    if (!p.alive.empty()) item.alive = alive_bits(op, p.alive[i], item.numel);
    item.first_element = search.numel;
    item.first_chunk = search.n_chunks;
    search.numel += item.numel;
    search.n_chunks += (item.numel + kChunk - 1) / kChunk;
  }
  search.items = prepared.items.data();
  search.n_items = static_cast<int64_t>(prepared.items.size());
  return prepared;
}

void run_step(Search& search) {
  Run* const step = SECATEUR_FOR_ISA(run);
  torch::stable::parallel_for(0, search.n_tasks,
                              search.step == Step::Sample ? kGrainSamples : kGrainTasks,
                              [&](int64_t begin, int64_t end) { step(search, begin, end); });
}

// (index of the first weight with a bad score or -1, number of elements alive)
Tensor info_of(const Search& search, const Tensor& like) {
  Tensor info = torch::stable::new_empty(like, {2}, ScalarType::Long);
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
  STD_TORCH_CHECK(keep.has_value() != threshold.has_value(),
                  "select: expected either keep or threshold");
  auto [items, search] = prepare(
      "select", {weights, grads, states, formula, alive, largest, finite, normalizers, seeds});

  // Outputs
  std::vector<Tensor> masks;
  for (Item& item : items) {
    masks.push_back(torch::stable::new_empty(weights[0], {(item.numel + 7) / 8}, ScalarType::Byte));
    item.mask = static_cast<uint8_t*>(masks.back().mutable_data_ptr());
  }

  // Dispatch
  search->by_threshold = threshold.has_value();
  search->threshold = threshold.value_or(0);
  search->keep = keep.value_or(0);
  search->capacity = SECATEUR_FOR_ISA(capacity)(search->numel);
  const auto candidates = std::make_unique_for_overwrite<Candidates[]>(search->n_chunks);
  const auto keys = std::make_unique_for_overwrite<int64_t[]>(
      search->wide ? search->capacity : (search->capacity + 1) / 2);
  const auto offsets = std::make_unique_for_overwrite<uint16_t[]>(search->capacity);
  search->candidates = candidates.get();
  search->keys = keys.get();
  search->offsets = offsets.get();
  SECATEUR_FOR_ISA(start)(*search);
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
  auto [items, search] = prepare(
      "histogram", {weights, grads, states, formula, alive, largest, true, normalizers, seeds});

  // Outputs
  Tensor bins = torch::stable::new_empty(weights[0], {kBins}, ScalarType::Long);
  Tensor counts = torch::stable::new_zeros(weights[0], {search->n_items, 2}, ScalarType::Long);
  for (int64_t i = 0; i < search->n_items; ++i)
    items[i].counts = static_cast<int64_t*>(counts.mutable_data_ptr()) + 2 * i;

  // Dispatch
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
