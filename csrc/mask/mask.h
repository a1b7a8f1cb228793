#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace secateur::mask {

// bits[i / 8] holds element i at bit i % 8, 1 = alive. Ranges count bytes of the mask.
using Pack = void(const uint8_t* bools, int64_t numel, uint8_t* bits, int64_t begin, int64_t end);
using Unpack = void(const uint8_t* bits, int64_t numel, uint8_t* bools, int64_t begin, int64_t end);
// Whether something dead was not zero.
using Apply = bool(const View& tensor, int64_t numel, const uint8_t* bits, int64_t begin,
                   int64_t end);

SECATEUR_PER_ISA(Pack pack; Unpack unpack; Apply apply)

// apply on all of a tensor, on torch's threads.
bool apply_all(const View& tensor, int64_t numel, const uint8_t* bits);

// On a CUDA stream; they return a cudaError_t.
namespace CUDA {

struct Target {
  View tensor;
  int64_t numel;
  const uint8_t* bits;
};

int pack(const uint8_t* bools, int64_t numel, uint8_t* bits, void* stream);
// `bools` is aligned to 16 bytes.
int unpack(const uint8_t* bits, int64_t numel, uint8_t* bools, void* stream);
// flags[i], zero before, becomes 1 if something dead of targets[i] was not zero. There is memory
// for a multiple of four flags, aligned to as much.
int apply(const Target* targets, int64_t count, uint8_t* flags, void* stream);

}  // namespace CUDA
}  // namespace secateur::mask
