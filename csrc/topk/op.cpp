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

void check_length(const char* name, size_t length, size_t expected, bool required) {
  STD_TORCH_CHECK(length == expected || (length == 0 && !required), "select: expected ", expected,
                  " ", name, ", one a weight, got ", length);
}

const uint8_t* alive_bits(const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Byte && t.is_contiguous() && t.numel() == (numel + 7) / 8,
      "select: expected ", (numel + 7) / 8, " contiguous bytes (uint8) of alive mask for ", numel,
      " elements, got ", t.scalar_type(), " of ", t.numel());
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

// The masks, and (index of the first weight with a bad score or -1, number of elements alive).
std::tuple<std::vector<Tensor>, Tensor> select_cpu(
    std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> states,
    std::string formula, std::vector<Tensor> alive, std::optional<int64_t> keep,
    std::optional<double> threshold, bool largest, bool finite, std::vector<double> normalizers,
    std::vector<int64_t> seeds) {
  // Checks
  STD_TORCH_CHECK(!weights.empty(), "select: expected at least one weight, got none");
  STD_TORCH_CHECK(keep.has_value() != threshold.has_value(),
                  "select: expected either keep or threshold");
  check_length("grads", grads.size(), weights.size(), false);
  check_length("states", states.size(), weights.size(), false);
  check_length("alive masks", alive.size(), weights.size(), false);
  check_length("normalizers", normalizers.size(), weights.size(), true);
  check_length("seeds", seeds.size(), weights.size(), true);
  const Mode mode = states.empty() ? Mode::Observe : Mode::State;

  // Outputs
  auto search = std::make_unique<Search>();
  std::vector<Item> items(weights.size());
  std::vector<Tensor> masks;
  search->wide = weights[0].scalar_type() == ScalarType::Double;
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK((weights[i].scalar_type() == ScalarType::Double) == search->wide,
                    "select: expected weights that are all float64 or none, got ",
                    weights[0].scalar_type(), " and ", weights[i].scalar_type());
    Item& item = items[i];
    const ScoreParams params{normalizers[i], 0, 0, static_cast<uint64_t>(seeds[i])};
    item.inputs =
        score_inputs("select", weights[i], at(grads, i), at(states, i), mode, formula, params);
    item.numel = weights[i].numel();
    if (!alive.empty()) item.alive = alive_bits(alive[i], item.numel);
    masks.push_back(torch::stable::new_empty(weights[i], {(item.numel + 7) / 8}, ScalarType::Byte));
    item.mask = static_cast<uint8_t*>(masks.back().mutable_data_ptr());
    item.first_element = search->numel;
    item.first_chunk = search->n_chunks;
    search->numel += item.numel;
    search->n_chunks += (item.numel + kChunk - 1) / kChunk;
  }
  Tensor info = torch::stable::new_empty(weights[0], {2}, ScalarType::Long);

  // Dispatch
  search->items = items.data();
  search->n_items = static_cast<int64_t>(items.size());
  search->mode = mode;
  search->largest = largest;
  search->finite = finite;
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
  Run* step = SECATEUR_FOR_ISA(run);
  SECATEUR_FOR_ISA(start)(*search);
  while (search->step != Step::Done) {
    torch::stable::parallel_for(0, search->n_tasks,
                                search->step == Step::Sample ? kGrainSamples : kGrainTasks,
                                [&](int64_t begin, int64_t end) { step(*search, begin, end); });
    SECATEUR_FOR_ISA(advance)(*search);
  }
  int64_t* const result = static_cast<int64_t*>(info.mutable_data_ptr());
  result[0] = search->bad_item < search->n_items ? search->bad_item : -1;
  result[1] = search->alive;
  return {masks, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "select(Tensor[] weights, Tensor[] grads, Tensor[] states, str formula, Tensor[] alive, "
      "int? keep, float? threshold, bool largest, bool finite, float[] normalizers, int[] seeds) "
      "-> (Tensor[], Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) { m.impl("select", TORCH_BOX(&select_cpu)); }

}  // namespace secateur::topk
