#pragma once
// What the ops of every device check and make alike; for op.cpp and op_cuda.cpp.
#include <optional>
#include <string>
#include <vector>

#include "common/score_inputs.h"
#include "common/torch.h"
#include "topk/topk.h"

namespace secateur::topk {

inline const uint8_t* alive_bits(const char* op, const Tensor& t, const Tensor& weight) {
  const int64_t numel = weight.numel();
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Byte && t.is_contiguous() && t.numel() == (numel + 7) / 8, op,
      ": expected ", (numel + 7) / 8, " contiguous bytes (uint8) of alive mask for ", numel,
      " elements, got ", t.scalar_type(), " of ", t.numel());
  STD_TORCH_CHECK(t.device() == weight.device(), op,
                  ": expected alive masks to be on the weights' device");
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

// What every op here is told: what to score, what of it is alive, what is better.
struct Request {
  std::vector<Tensor> weights, grads, states;
  std::string formula;
  std::vector<Tensor> alive;
  bool largest, finite;
  std::vector<double> normalizers;
  std::vector<int64_t> seeds;
};

// Items without outputs, and nothing of what is looked for.
struct Prepared {
  std::vector<Item> items;
  Problem problem;
};

inline Prepared prepare(const char* op, const Request& r) {
  STD_TORCH_CHECK(!r.weights.empty(), op, ": expected at least one weight, got none");
  check_length(op, "grads", r.grads.size(), r.weights.size(), false);
  check_length(op, "states", r.states.size(), r.weights.size(), false);
  check_length(op, "alive masks", r.alive.size(), r.weights.size(), false);
  check_length(op, "normalizers", r.normalizers.size(), r.weights.size(), true);
  check_length(op, "seeds", r.seeds.size(), r.weights.size(), true);

  Prepared prepared{std::vector<Item>(r.weights.size()), {}};
  Problem& problem = prepared.problem;
  problem.mode = r.states.empty() ? Mode::Observe : Mode::State;
  problem.wide = r.weights[0].scalar_type() == ScalarType::Double;
  problem.largest = r.largest;
  problem.finite = r.finite;
  for (size_t i = 0; i < r.weights.size(); ++i) {
    const Tensor& weight = r.weights[i];
    STD_TORCH_CHECK((weight.scalar_type() == ScalarType::Double) == problem.wide, op,
                    ": expected weights that are all float64 or none, got ",
                    r.weights[0].scalar_type(), " and ", weight.scalar_type());
    check_device(op, r.weights, i);
    Item& item = prepared.items[i];
    const ScoreParams params{r.normalizers[i], 0, 0, static_cast<uint64_t>(r.seeds[i])};
    item.inputs =
        score_inputs(op, weight, at(r.grads, i), at(r.states, i), problem.mode, r.formula, params);
    item.numel = weight.numel();
    if (!r.alive.empty()) item.alive = alive_bits(op, r.alive[i], weight);
    item.first_element = problem.numel;
    item.first_chunk = problem.n_chunks;
    problem.numel += item.numel;
    problem.n_chunks += (item.numel + kChunk - 1) / kChunk;
  }
  problem.items = prepared.items.data();
  problem.n_items = static_cast<int64_t>(prepared.items.size());
  return prepared;
}

inline void set_goal(Problem& problem, std::optional<int64_t> keep,
                     std::optional<double> threshold) {
  STD_TORCH_CHECK(keep.has_value() != threshold.has_value(),
                  "select: expected either keep or threshold");
  STD_TORCH_CHECK(keep.value_or(0) >= 0, "select: expected keep to be at least 0, got ",
                  keep.value_or(0));
  problem.by_threshold = threshold.has_value();
  problem.threshold = threshold.value_or(0);
  problem.keep = keep.value_or(0);
}

inline std::vector<Tensor> new_masks(std::vector<Item>& items, const Tensor& like) {
  std::vector<Tensor> masks;
  for (Item& item : items) {
    masks.push_back(new_tensor(like, {(item.numel + 7) / 8}, ScalarType::Byte));
    item.mask = static_cast<uint8_t*>(masks.back().mutable_data_ptr());
  }
  return masks;
}

inline Tensor new_counts(std::vector<Item>& items, const Tensor& like) {
  Tensor counts =
      torch::stable::new_zeros(like, {static_cast<int64_t>(items.size()), 2}, ScalarType::Long);
  for (size_t i = 0; i < items.size(); ++i)
    items[i].counts = static_cast<int64_t*>(counts.mutable_data_ptr()) + 2 * i;
  return counts;
}

}  // namespace secateur::topk
