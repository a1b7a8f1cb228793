#include <vector>

#include "common/torch_cuda.h"
#include "mask/checks.h"
#include "mask/mask.h"

namespace secateur::mask {
namespace {

Tensor pack_cuda(const Tensor& mask) {
  check_mask(mask);
  const Device device(mask);
  const Tensor source = torch::stable::contiguous(mask);
  const int64_t numel = mask.numel();
  Tensor bits = new_tensor(mask, {byte_count(numel)}, ScalarType::Byte);
  if (numel == 0) return bits;
  check_launch("pack_mask", CUDA::pack(bytes(source), numel, mutable_bytes(bits), device.stream()));
  return bits;
}

Tensor unpack_cuda(const Tensor& bits, std::vector<int64_t> shape) {
  const int64_t numel = numel_of(shape);
  check_bits("unpack_mask", bits, numel);
  const Device device(bits);
  Tensor mask = new_tensor(bits, shape, ScalarType::Bool);
  if (numel == 0) return mask;
  check_launch("unpack_mask",
               CUDA::unpack(bytes(bits), numel, mutable_bytes(mask), device.stream()));
  return mask;
}

// For each tensor whether something dead was not zero.
Tensor apply_cuda(std::vector<Tensor> tensors, std::vector<Tensor> bits) {
  check_targets(tensors, bits);
  const Device device(bits[0]);
  const int64_t count = static_cast<int64_t>(tensors.size());
  std::vector<CUDA::Target> targets;
  for (int64_t i = 0; i < count; ++i)
    targets.push_back(
        {mutable_view_of(tensors[i], "mask_", "tensors"), tensors[i].numel(), bytes(bits[i])});
  Tensor flags = torch::stable::new_zeros(bits[0], {(count + 3) / 4 * 4}, ScalarType::Bool);
  check_launch("mask_", CUDA::apply(targets.data(), count, mutable_bytes(flags), device.stream()));
  return torch::stable::narrow(flags, 0, 0, count);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SECATEUR_CUDA_LIBRARY, SECATEUR_CUDA_KEY, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_cuda));
  m.impl("unpack_mask", TORCH_BOX(&unpack_cuda));
  m.impl("mask_", TORCH_BOX(&apply_cuda));
}

}  // namespace secateur::mask
