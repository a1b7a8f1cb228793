#pragma once
// Comes before everything else in files that are instrumented (build.py). Compilers make calls of
// these from copies of memory, and the instrumentation leaves them out: the checker takes them.
#include <cstddef>

extern "C" {
void* memcpy(void* to, const void* from, size_t bytes) noexcept asm("cuda_emulator_memcpy");
void* memmove(void* to, const void* from, size_t bytes) noexcept asm("cuda_emulator_memmove");
void* memset(void* to, int value, size_t bytes) noexcept asm("cuda_emulator_memset");
}
