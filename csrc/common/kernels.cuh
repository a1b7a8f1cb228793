#pragma once
// What the kernels of several cuda.cu files share.
#include <algorithm>
#include <cstdint>

#include "common/cuda.cuh"

namespace secateur {
namespace {

constexpr int kThreads = 256;                // of a block
constexpr int kLoadBytes = 16;               // the most that a thread loads or stores at once
constexpr unsigned kAllLanes = 0xffffffffu;  // of a warp
// Some rounds on every multiprocessor; beyond, blocks loop, and report less often what they found.
// The emulator has fewer, so that they loop in most of its tests.
#ifndef SECATEUR_MAX_BLOCKS
#define SECATEUR_MAX_BLOCKS 4096
#endif
constexpr int64_t kMaxBlocks = SECATEUR_MAX_BLOCKS;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned blocks_for(int64_t tiles) {
  return static_cast<unsigned>(std::min(tiles, kMaxBlocks));
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLoadBytes == 0; }

// The last of the entries whose kFirst, which does not decrease, is at most `at`; the first one's
// is.
template <auto kFirst, typename Entry>
__device__ int find(const Entry* entries, int64_t count, int64_t at) {
  int low = 0, high = static_cast<int>(count);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (entries[middle].*kFirst <= at ? low : high) = middle;
  }
  return low;
}

// Sets `bits` of *word if some thread found something; called by all threads of a block. Atomic,
// since other blocks report there as well.
__device__ inline void report(uint32_t* word, uint32_t bits, bool found) {
  if (__syncthreads_or(found) && threadIdx.x == 0) atomicOr(word, bits);
}

}  // namespace
}  // namespace secateur
