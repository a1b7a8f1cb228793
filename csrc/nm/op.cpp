#include <optional>
#include <string>
#include <tuple>

#include "common/torch.h"
#include "nm/checks.h"
#include "nm/nm.h"

namespace secateur::nm {
namespace {

constexpr int64_t kGrainUnits = 4;

// The mask, and whether some score is NaN or infinite.
std::tuple<Tensor, Tensor> nm_mask_cpu(const Tensor& weight, std::optional<Tensor> grad,
                                       std::optional<Tensor> state, std::string formula, int64_t n,
                                       int64_t m, bool largest, double normalizer, int64_t seed) {
  // Checks
  Args args = checked_args(weight, grad, state, formula, n, m, largest, normalizer, seed);

  // Outputs
  Tensor mask = new_tensor(weight, {(args.numel + 7) / 8}, ScalarType::Byte);
  Tensor bad = torch::stable::new_zeros(weight, {}, ScalarType::Bool);
  if (args.numel == 0) return {mask, bad};
  args.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());

  // Dispatch
  uint8_t* const flag = static_cast<uint8_t*>(bad.mutable_data_ptr());
  Run* kernel = SECATEUR_FOR_ISA(run);
  for_pieces((args.numel + kUnit - 1) / kUnit, kGrainUnits, [&](int64_t begin, int64_t end) {
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
