#include <algorithm>
#include <atomic>
#include <vector>

#include "common/torch.h"
#include "mask/checks.h"
#include "mask/mask.h"

namespace secateur::mask {
namespace {

// Threads take whole bytes of the mask, so no two write one byte.
constexpr int64_t kGrainBytes = 4096;

Tensor pack_cpu(const Tensor& mask) {
  check_mask(mask);
  const Tensor source = torch::stable::contiguous(mask);
  const int64_t numel = mask.numel();
  Tensor bits = new_tensor(mask, {byte_count(numel)}, ScalarType::Byte);
  if (numel == 0) return bits;
  Pack* run = SECATEUR_FOR_ISA(pack);
  for_pieces(byte_count(numel), kGrainBytes, [&](int64_t begin, int64_t end) {
    run(bytes(source), numel, mutable_bytes(bits), begin, end);
  });
  return bits;
}

Tensor unpack_cpu(const Tensor& bits, std::vector<int64_t> shape) {
  const int64_t numel = numel_of(shape);
  check_bits("unpack_mask", bits, numel);
  Tensor mask = new_tensor(bits, shape, ScalarType::Bool);
  if (numel == 0) return mask;
  prefer_huge_pages(mask.mutable_data_ptr(), numel);
  Unpack* run = SECATEUR_FOR_ISA(unpack);
  for_pieces(byte_count(numel), kGrainBytes, [&](int64_t begin, int64_t end) {
    populate(mutable_bytes(mask) + 8 * begin, std::min(8 * end, numel) - 8 * begin);
    run(bytes(bits), numel, mutable_bytes(mask), begin, end);
  });
  return mask;
}

// For each tensor whether something dead was not zero.
Tensor apply_cpu(std::vector<Tensor> tensors, std::vector<Tensor> bits) {
  check_targets(tensors, bits);
  Tensor revived = new_tensor(bits[0], {static_cast<int64_t>(tensors.size())}, ScalarType::Bool);
  uint8_t* const flags = mutable_bytes(revived);
  std::fill_n(flags, tensors.size(), 0);
  // One loop over the bytes of all masks: to start the threads takes as long as a small tensor.
  std::vector<View> views;
  std::vector<int64_t> first{0};
  for (size_t i = 0; i < tensors.size(); ++i) {
    views.push_back(mutable_view_of(tensors[i], "mask_", "tensors"));
    first.push_back(first[i] + byte_count(tensors[i].numel()));
  }
  if (first.back() == 0) return revived;
  Apply* run = SECATEUR_FOR_ISA(apply);
  for_pieces(first.back(), kGrainBytes, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; begin = first[++i]) {
      const int64_t stop = std::min(end, first[i + 1]);
      if (begin < stop &&
          run(views[i], tensors[i].numel(), bytes(bits[i]), begin - first[i], stop - first[i]))
        __atomic_store_n(flags + i, uint8_t{1}, __ATOMIC_RELAXED);  // threads may do it at once
    }
  });
  return revived;
}

}  // namespace

bool apply_all(const View& tensor, int64_t numel, const uint8_t* bits) {
  Apply* run = SECATEUR_FOR_ISA(apply);
  std::atomic<bool> revived{false};
  for_pieces(byte_count(numel), kGrainBytes, [&](int64_t begin, int64_t end) {
    if (run(tensor, numel, bits, begin, end)) revived.store(true, std::memory_order_relaxed);
  });
  return revived;
}

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor bits, int[] shape) -> Tensor");
  m.def("mask_(Tensor(a!)[] tensors, Tensor[] bits) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_cpu));
  m.impl("unpack_mask", TORCH_BOX(&unpack_cpu));
  m.impl("mask_", TORCH_BOX(&apply_cpu));
}

}  // namespace secateur::mask
