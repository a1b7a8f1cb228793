#pragma once
// What the checker asks of the launch that is running.
#include <cstddef>
#include <cstdint>

namespace cuda_emulator {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

// Whether a CUDA thread is running now; host code is not checked.
bool in_kernel();
unsigned current_thread();
// The stack of the CUDA thread that runs: its local memory.
bool on_own_stack(const void* address);

void set_seed(uint64_t seed);

}  // namespace cuda_emulator
