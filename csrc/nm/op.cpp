#include <optional>
#include <string>
#include <tuple>

#include "common/score_inputs.h"
#include "common/torch.h"
#include "nm/nm.h"

namespace secateur::nm {
namespace {

constexpr int64_t kGrainUnits = 4;

// The mask, and whether some score is NaN or infinite.
std::tuple<Tensor, Tensor> nm_mask_cpu(const Tensor& weight, std::optional<Tensor> grad,
                                       std::optional<Tensor> state, std::string formula, int64_t n,
                                       int64_t m, bool largest, double normalizer, int64_t seed) {
  // Checks
  STD_TORCH_CHECK(1 <= n && n <= m && m <= kMaxGroup,
                  "nm_mask: expected 1 <= n <= m <= ", kMaxGroup, ", got n = ", n, " and m = ", m);
  Args args{};
  args.mode = state ? Mode::State : Mode::Observe;
  const ScoreParams params{normalizer, 0, 0, static_cast<uint64_t>(seed)};
  args.inputs = score_inputs("nm_mask", weight, grad, state, args.mode, formula, params);
  args.wide = weight.scalar_type() == ScalarType::Double;
  args.largest = largest;
  args.numel = weight.numel();
  args.n = n;
  args.m = m;

  // Outputs
  Tensor mask = torch::stable::new_empty(weight, {(args.numel + 7) / 8}, ScalarType::Byte);
  Tensor bad = torch::stable::new_zeros(weight, {}, ScalarType::Bool);
  if (args.numel == 0) return {mask, bad};
  args.n_cols = weight.dim() == 0 ? 1 : args.numel / weight.size(0);
  args.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());

  // Dispatch
  uint8_t* const flag = static_cast<uint8_t*>(bad.mutable_data_ptr());
  Run* kernel = SECATEUR_FOR_ISA(run);
  torch::stable::parallel_for(
      0, (args.numel + kUnit - 1) / kUnit, kGrainUnits, [&](int64_t begin, int64_t end) {
        if (kernel(args, begin, end))
          __atomic_store_n(flag, uint8_t{1}, __ATOMIC_RELAXED);  // threads may do it at once
      });
  return {mask, bad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "nm_mask(Tensor weight, Tensor? grad, Tensor? state, str formula, int n, int m, "
      "bool largest, float normalizer, int seed) -> (Tensor mask, Tensor bad)");
}
STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) { m.impl("nm_mask", TORCH_BOX(&nm_mask_cpu)); }

}  // namespace secateur::nm
