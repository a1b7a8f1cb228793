#pragma once
// CUDA's language for a C++20 compiler: a .cu file that includes this instead of cuda_runtime.h is
// C++ and runs on a CPU. See README.md.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <type_traits>
#include <utility>

#include "atomics.h"
#include "collectives.h"
#include "emulator.h"
#include "intrinsics.h"
#include "runtime_api.h"
#include "tensor_cores.h"
#include "vectors.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (::cuda_emulator::thread_index())
#define blockIdx (::cuda_emulator::block_index())
#define blockDim (::cuda_emulator::block_size())
#define gridDim (::cuda_emulator::grid_size())
constexpr int warpSize = 32;

namespace cuda_emulator {

// Kernel parameters as they lie on a GPU: in order, each at the next multiple of its alignment.
template <typename... Parameters>
struct Arguments {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));

  // Where each begins, and where the last one ends.
  static constexpr auto kOffsets = [] {
    std::array<size_t, sizeof...(Parameters) + 1> offsets{};
    size_t i = 0, end = 0;
    ((offsets[i++] = end = (end + alignof(Parameters) - 1) & ~(alignof(Parameters) - 1),
      end += sizeof(Parameters)),
     ...);
    offsets[i] = end;
    return offsets;
  }();
  static constexpr size_t kBytes = kOffsets.back();

  alignas(16) unsigned char bytes[kBytes + 1];

  explicit Arguments(const Parameters&... values) {
    size_t i = 0;
    ((void)std::memcpy(bytes + kOffsets[i++], &values, sizeof(values)), ...);
  }

  static void call(void (*kernel)(Parameters...), const void* arguments) {
    const auto* const bytes = static_cast<const unsigned char*>(arguments);
    [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
      kernel(*reinterpret_cast<const Parameters*>(bytes + kOffsets[kIndex])...);
    }(std::index_sequence_for<Parameters...>());
  }
};

template <typename... Parameters, typename... Values>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const void* /*stream*/,
            void (*kernel)(Parameters...), Values&&... values) {
  using Packed = Arguments<Parameters...>;
  const Packed arguments(static_cast<Parameters>(std::forward<Values>(values))...);
  const auto body = [](const void* kernel, const void* arguments) {
    Packed::call(reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(kernel)), arguments);
  };
  run({name,
       reinterpret_cast<const void*>(kernel),
       grid,
       block,
       shared_bytes,
       &arguments,
       {body, Packed::kBytes}});
}

// A shared array has no more alignment than its type gives it, and nothing else close behind it.
template <typename T, size_t kCount>
struct SharedArray {
  static constexpr size_t kLine = 128;
  static_assert(alignof(T) <= kLine);
  alignas(kLine) unsigned char before[alignof(T)];
  T elements[kCount];
  unsigned char behind[kLine];

  T(&open(const char* name))
  [kCount] {
    open_shared(elements, sizeof(elements), name);
    return elements;
  }
};

// For a function that is called through ctypes, where no exception may pass: the message of what
// `f` throws, or null. Valid until the next call.
template <typename F>
const char* message_of(F&& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace cuda_emulator

// The three spellings that differ from plain CUDA.
#define SECATEUR_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)       \
  ::cuda_emulator::launch(#kernel, (grid), (block), (shared_bytes), (stream), \
                          (kernel)__VA_OPT__(, ) __VA_ARGS__)
#define SECATEUR_SHARED(T, name, count)                                              \
  static ::cuda_emulator::SharedArray<T, static_cast<size_t>(count)> name##_storage; \
  T(&name)[count] = name##_storage.open(#name)
#define SECATEUR_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(::cuda_emulator::dynamic_shared())
