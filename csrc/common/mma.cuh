#pragma once
// Thin wrappers of the PTX that tensor cores are fed by: asynchronous copies, ldmatrix, mma.sync
// and the rounding to 16 bits. sm_80 and up; T is BFloat16 or Half. Under the emulator the same
// calls run on the CPU.
#include <cstdint>
#include <type_traits>

#include "common/cuda.cuh"
#include "common/dtype.h"

namespace secateur {
namespace {

#if !defined(SECATEUR_CUDA_EMULATOR)
__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Starts to copy 16 bytes to shared memory, of which those beyond the first `source_bytes` become
// zero; `global` is not read where `source_bytes` is 0. Both addresses are multiples of 16.
__device__ inline void copy_async(void* shared, const void* global, int source_bytes) {
#if defined(SECATEUR_CUDA_EMULATOR)
  cuda_emulator::copy_async(shared, global, 16, source_bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(source_bytes));
#endif
}

// The copies that this thread has started since the last call are a group from now on.
__device__ inline void commit_copies() {
#if defined(SECATEUR_CUDA_EMULATOR)
  cuda_emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;");
#endif
}

// Waits until at most the newest kPending groups of this thread are on their way.
template <int kPending>
__device__ void wait_for_copies() {
#if defined(SECATEUR_CUDA_EMULATOR)
  cuda_emulator::wait_for_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// kCount matrices of 8 x 8 elements of 16 bits: lane 8 i + j gives the address of row j of matrix
// i, and lane 4 g + t receives of each matrix elements 2 t and 2 t + 1 of row g, or, transposed, of
// column g.
template <bool kTransposed, int kCount>
__device__ void load_matrices(uint32_t (&to)[kCount], const void* row) {
  static_assert(kCount == 2 || kCount == 4);
#if defined(SECATEUR_CUDA_EMULATOR)
  cuda_emulator::load_matrices(to, kCount, row, kTransposed);
#else
  const uint32_t from = shared_address(row);
  if constexpr (kCount == 2 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from));
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from));
  else if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
#endif
}

// sum += a * b for a of 16 x 16 and b of 16 x 8. Lane 4 g + t holds of `a` rows g, g + 8 at columns
// 2 t, 2 t + 1 and then the same 8 columns on; of `b` rows 2 t, 2 t + 1 and those 8 on, at column
// g; of `sum` rows g and g + 8 at columns 2 t, 2 t + 1.
template <typename T>
__device__ void multiply_accumulate(float (&sum)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
#if defined(SECATEUR_CUDA_EMULATOR)
  constexpr bool kHalf = std::is_same_v<T, Half>;
  cuda_emulator::multiply_accumulate(
      kHalf ? cuda_emulator::Format::Half : cuda_emulator::Format::BFloat16, sum, a, b, sum);
#else
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two floats rounded to T, to nearest and ties to even; `low` is the element that comes first.
template <typename T>
__device__ uint32_t narrow_pair(float low, float high) {
#if defined(SECATEUR_CUDA_EMULATOR)
  return uint32_t{narrow<T>(high).bits} << 16 | narrow<T>(low).bits;
#else
  uint32_t pair;
  if constexpr (std::is_same_v<T, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

}  // namespace
}  // namespace secateur
