#pragma once
// Atomics and fences. All fibers share one operating system thread, so a plain read, change and
// write is atomic; other threads may be let past first.
#include <type_traits>

#include "emulator.h"

namespace cuda_emulator {

// Not instrumented: the checker is told what it is before it happens.
template <typename T, typename Change>
[[gnu::no_sanitize("thread"), gnu::noinline]] T read_modify_write(T* address, Change change) {
  before_atomic(address, sizeof(T), __builtin_return_address(0));
  const T before = *address;
  *address = change(before);
  return before;
}

}  // namespace cuda_emulator

#define CUDA_EMULATOR_ATOMIC(name, after)                                                         \
  template <typename T>                                                                           \
  T name(T* address, std::type_identity_t<T> value) {                                             \
    return cuda_emulator::read_modify_write(address,                                              \
                                            [value](T before) { return static_cast<T>(after); }); \
  }
CUDA_EMULATOR_ATOMIC(atomicAdd, before + value)
CUDA_EMULATOR_ATOMIC(atomicSub, before - value)
CUDA_EMULATOR_ATOMIC(atomicMin, before < value ? before : value)
CUDA_EMULATOR_ATOMIC(atomicMax, before > value ? before : value)
CUDA_EMULATOR_ATOMIC(atomicAnd, before& value)
CUDA_EMULATOR_ATOMIC(atomicOr, before | value)
CUDA_EMULATOR_ATOMIC(atomicXor, before ^ value)
CUDA_EMULATOR_ATOMIC(atomicInc, before >= value ? 0 : before + 1)
CUDA_EMULATOR_ATOMIC(atomicDec, before == 0 || before > value ? value : before - 1)
#undef CUDA_EMULATOR_ATOMIC

template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return cuda_emulator::read_modify_write(address, [value](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_emulator::read_modify_write(
      address, [=](T before) { return before == expected ? value : before; });
}

inline void __threadfence() { cuda_emulator::fence(); }
inline void __threadfence_block() { cuda_emulator::reschedule(); }
inline void __nanosleep(unsigned) { cuda_emulator::reschedule(); }
