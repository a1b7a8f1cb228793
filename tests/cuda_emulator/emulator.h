#pragma once
// What the CUDA language of cuda_emulator.h asks of the runtime. Kernels run one block after the
// other on the thread that launches them; within a block every CUDA thread is a fiber.
#include <cstddef>
#include <cstdint>

#include "vectors.h"

namespace cuda_emulator {

// Where a kernel called something: a default argument `Site site = here()` is evaluated there.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

// Nothing here changes while a CUDA thread runs, which is all that code ever sees of it: the
// compiler may call these once and keep the result.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] unsigned lane();

// What a kernel's threads run, each of them.
struct Code {
  void (*body)(const void* kernel, const void* arguments);
  size_t arguments_size;
  unsigned max_threads = 1024;  // of a block, by its __launch_bounds__
};

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  const void* arguments;  // in kernel parameter space: read only
  Code code;
};

// Throws std::runtime_error with the first thing that went wrong.
void run(Launch launch);

// Launches of a kernel run other code than its own from now on: what nvcc made of it (ptx/).
// Where one kernel of a library has such code, all must.
void replace(const void* kernel, const Code& code);

// Ends the launch with an error that names kernel, block and thread.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Lets other threads go on first, if the seed of the schedule says so.
void reschedule();

enum class Barrier { Plain, Count, And, Or };
int wait_for_block(Barrier kind, const char* name, int predicate, Site site);

// A warp collective as one lane calls it. All lanes that `mask` names must arrive with the same
// name and mask; then `exchange` is run once with their calls, by lane.
struct WarpCall {
  const char* name;
  uint32_t mask;
  void (*exchange)(WarpCall* const* calls, uint32_t mask);
  void* data;
  Site site;
};
void wait_for_warp(WarpCall& call);

// Memory order among the lanes of `mask`; only __syncwarp gives it.
void order_warp(uint32_t mask);

// Every arrival at the declaration of a shared array comes here; the first one of a block fills it
// with garbage.
void open_shared(void* array, size_t bytes, const char* name);
[[gnu::const]] void* dynamic_shared();

// Says that memory is about to be read by __ldg.
void before_read_only(const void* address, size_t bytes);
void before_atomic(const void* address, size_t bytes, const void* program_counter);
void fence();

void allow_dynamic_shared(const void* kernel, size_t bytes);
void fill_buffer(void* address, int value, size_t bytes);  // cudaMemset

}  // namespace cuda_emulator
