#pragma once
// What kernels in cuda.cu files are written in. Plain CUDA but for three spellings, which
// tests/cuda_emulator/ replaces to run the same source on a CPU.
#if defined(SECATEUR_CUDA_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>

#define SECATEUR_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SECATEUR_SHARED(T, name, count) __shared__ T name[count]
#define SECATEUR_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char secateur_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(secateur_dynamic_shared)
#endif

namespace secateur {
namespace {

// `p`, of which nvcc cannot see that it is global memory where the address was itself loaded.
template <typename T>
__device__ inline T* global(T* p) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

}  // namespace
}  // namespace secateur
