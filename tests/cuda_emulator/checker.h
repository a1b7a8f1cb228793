#pragma once
// Checks every access that a kernel makes to global, shared and constant memory: is it within an
// array, was the memory written before it is read, and is the access ordered with those that other
// threads made to the same byte. Off unless the kernels are instrumented (see hooks.cpp).
#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator.h"

namespace cuda_emulator::checker {

inline bool enabled = false;

// Bytes of global memory that kernels accessed.
inline uint64_t bytes_read = 0, bytes_written = 0;

enum class Access { Read, Write, Atomic };

// Global memory that kernels may touch. Memory that is added again keeps what is known of it
// unless `reset`.
void add_buffer(const void* address, size_t bytes, bool initialised, bool reset);
void forget_buffers();

void begin_launch(const Launch& launch, const void* stacks, size_t stack_bytes);
void begin_block();
void end_block();
// Shared memory of the block, not initialised.
void add_shared(const void* address, size_t bytes, const char* name);

// Memory order: a barrier of the block, one of some lanes of a warp, a fence of one thread.
void barrier();
void sync_warp(unsigned warp, uint32_t mask);
void fence(unsigned thread);

void access(const void* address, size_t bytes, Access kind, const void* program_counter);
// A read through a cache that does not see what the launch writes (ld.global.nc); before access().
void read_only(const void* address, size_t bytes, const void* program_counter);
// An asynchronous copy by this thread writes to memory from now on, until it has waited for it.
void begin_copy(const void* address, size_t bytes, const void* program_counter);
void end_copy(const void* address, size_t bytes, const void* program_counter);
// Memory that was written by something other than a kernel.
void wrote(const void* address, size_t bytes);

// File and line of an instruction, if the image has debug information and addr2line is there.
std::string location(const void* program_counter);

}  // namespace cuda_emulator::checker
