#pragma once
#include <cstdint>

#include "common/isa.h"

namespace secateur::mask {

constexpr int kMaxDims = 8;

// One tensor seen by its last dimension: element (i0, ..., id) of logical index
// ((i0 * size[1] + i1) * ...) lies at data + sum(i * stride); strides in elements.
struct View {
  void* data;
  int64_t element_size;  // bytes
  int ndim;              // >= 1; neighbouring dimensions that are contiguous are merged
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

// bits[i / 8] holds element i at bit i % 8, 1 = alive. Ranges count bytes of the mask.
using Pack = void(const uint8_t* bools, int64_t numel, uint8_t* bits, int64_t begin, int64_t end);
using Unpack = void(const uint8_t* bits, int64_t numel, uint8_t* bools, int64_t begin, int64_t end);
using Apply = void(const View& tensor, int64_t numel, const uint8_t* bits, int64_t begin,
                   int64_t end);

SECATEUR_PER_ISA(Pack pack; Unpack unpack; Apply apply)

}  // namespace secateur::mask
