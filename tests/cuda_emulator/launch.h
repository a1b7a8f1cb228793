#pragma once
// What the checker asks of the launch that is running.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cuda_emulator {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

// A file's name without its folder, for messages.
inline const char* base_name(const char* file) {
  const char* const slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

// Whether a CUDA thread is running now; host code is not checked.
bool in_kernel();
unsigned current_thread();
// The stack of the CUDA thread that runs: its local memory.
bool on_own_stack(const void* address);

void set_seed(uint64_t seed);

// When an asynchronous copy's bytes are there: as late as the kernel's waits allow, or at once. A
// kernel must be right with both.
enum class Arrival { Late, Eager };
void set_arrival(Arrival when);
// How the tensor cores add up, which no document says. A kernel's result must be good with all:
// exactly, in double; one fused multiply-add after the other; or as an A100 was seen doing.
enum class Accumulation { Exact, Sequential, Truncating };
void set_accumulation(Accumulation how);
uint64_t matrix_products();  // by whole warps, since the library was loaded
uint64_t launches();         // since the library was loaded
// The copies that threads of the last block left on their way.
void forget_copies();

}  // namespace cuda_emulator
