#pragma once
// What the ops of every device check alike; for op.cpp and op_cuda.cpp.
#include <vector>

#include "common/torch.h"

namespace secateur::mask {

inline int64_t byte_count(int64_t numel) { return (numel + 7) / 8; }

inline const uint8_t* bytes(const Tensor& t) {
  return static_cast<const uint8_t*>(t.const_data_ptr());
}
inline uint8_t* mutable_bytes(const Tensor& t) {
  return static_cast<uint8_t*>(t.mutable_data_ptr());
}

inline int64_t numel_of(const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  return numel;
}

inline void check_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool,
                  "pack_mask: expected mask to be bool, got ", mask.scalar_type());
}

inline void check_bits(const char* op, const Tensor& bits, int64_t numel) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte, op, ": expected bits to be uint8, got ",
                  bits.scalar_type());
  STD_TORCH_CHECK(bits.is_contiguous() && bits.numel() == byte_count(numel), op, ": expected ",
                  byte_count(numel), " contiguous bytes of mask for ", numel, " elements, got ",
                  bits.numel());
}

inline void check_targets(const std::vector<Tensor>& tensors, const std::vector<Tensor>& bits) {
  STD_TORCH_CHECK(!tensors.empty(), "mask_: expected at least one tensor, got none");
  STD_TORCH_CHECK(tensors.size() == bits.size(), "mask_: expected one mask a tensor, got ",
                  tensors.size(), " tensors and ", bits.size(), " masks");
  for (size_t i = 0; i < tensors.size(); ++i) {
    dtype_of(tensors[i], "mask_", "tensors");
    check_bits("mask_", bits[i], tensors[i].numel());
    STD_TORCH_CHECK(
        tensors[i].device() == tensors[0].device() && bits[i].device() == tensors[0].device(),
        "mask_: expected all tensors and bits to be on one device, got tensors[", i,
        "] or its bits on another one than tensors[0]");
  }
}

}  // namespace secateur::mask
