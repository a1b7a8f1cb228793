#include <optional>
#include <string>
#include <tuple>

#include "common/torch_cuda.h"
#include "nm/checks.h"
#include "nm/nm.h"

namespace secateur::nm {
namespace {

// The mask, and whether some score is NaN or infinite.
std::tuple<Tensor, Tensor> nm_mask_cuda(const Tensor& weight, std::optional<Tensor> grad,
                                        std::optional<Tensor> state, std::string formula, int64_t n,
                                        int64_t m, bool largest, double normalizer, int64_t seed) {
  Args args = checked_args(weight, grad, state, formula, n, m, largest, normalizer, seed);
  const Device device(weight);
  Tensor mask = new_tensor(weight, {(args.numel + 7) / 8}, ScalarType::Byte);
  // The smallest that an atomic takes: four bytes.
  Tensor word = torch::stable::new_zeros(weight, {4}, ScalarType::Bool);
  Tensor bad = torch::stable::select(word, 0, 0);
  if (args.numel == 0) return {mask, bad};
  args.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  check_launch("nm_mask",
               CUDA::run(args, static_cast<uint32_t*>(word.mutable_data_ptr()), device.stream()));
  return {mask, bad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SECATEUR_CUDA_LIBRARY, SECATEUR_CUDA_KEY, m) {
  m.impl("nm_mask", TORCH_BOX(&nm_mask_cuda));
}

}  // namespace secateur::nm
