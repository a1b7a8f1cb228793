#pragma once
// What the kernels of several cuda.cu files share.
#include <algorithm>
#include <cstdint>

#include "common/cuda.cuh"

namespace secateur {
namespace {

constexpr int kThreads = 256;   // of a block
constexpr int kLoadBytes = 16;  // the most that a thread loads or stores at once
// Some rounds on every multiprocessor; beyond, blocks loop, and report less often what they found.
constexpr int64_t kMaxBlocks = 4096;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned blocks_for(int64_t tiles) {
  return static_cast<unsigned>(std::min(tiles, kMaxBlocks));
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLoadBytes == 0; }

// Sets `bits` of *word if some thread found something; called by all threads of a block. Atomic,
// since other blocks report there as well.
__device__ inline void report(uint32_t* word, uint32_t bits, bool found) {
  if (__syncthreads_or(found) && threadIdx.x == 0) atomicOr(word, bits);
}

}  // namespace
}  // namespace secateur
