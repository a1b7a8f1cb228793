// What the compiler calls in kernels that are instrumented by -fsanitize=thread, which are linked
// to these functions instead of the sanitizer's library, and by some of -fsanitize=undefined.
// Linking this file turns the checker on.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "checker.h"
#include "launch.h"

// The linker's names for where this library begins and where its code ends.
extern "C" __attribute__((visibility("hidden"))) const unsigned char __ehdr_start[], etext[];

namespace cuda_emulator {
namespace {

// Of each address that code has come back to from __sanitizer_cov_trace_pc(), which is called at
// the start of every basic block: whether it has.
std::vector<unsigned char> reached(static_cast<size_t>(etext - __ehdr_start));

[[maybe_unused]] const bool turned_on = checker::enabled = true;

void check(const void* address, size_t bytes, checker::Access kind, const void* program_counter) {
  checker::access(address, bytes, kind, program_counter);
}

}  // namespace
}  // namespace cuda_emulator

using cuda_emulator::base_name;
using cuda_emulator::check;
using cuda_emulator::checker::Access;

#define HERE __builtin_return_address(0)
#define ACCESSES(n)                                                             \
  void __tsan_read##n(void* p) { check(p, n, Access::Read, HERE); }             \
  void __tsan_write##n(void* p) { check(p, n, Access::Write, HERE); }           \
  void __tsan_unaligned_read##n(void* p) { check(p, n, Access::Read, HERE); }   \
  void __tsan_unaligned_write##n(void* p) { check(p, n, Access::Write, HERE); } \
  void __tsan_volatile_read##n(void* p) { check(p, n, Access::Read, HERE); }    \
  void __tsan_volatile_write##n(void* p) { check(p, n, Access::Write, HERE); }

extern "C" {

void __sanitizer_cov_trace_pc() {
  const auto at = static_cast<size_t>(static_cast<const unsigned char*>(HERE) - __ehdr_start);
  if (at < cuda_emulator::reached.size()) cuda_emulator::reached[at] = 1;
}
const unsigned char* cuda_emulator_reached(size_t* bytes) {
  *bytes = cuda_emulator::reached.size();
  return cuda_emulator::reached.data();
}

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t bytes) { check(p, bytes, Access::Read, HERE); }
void __tsan_write_range(void* p, size_t bytes) { check(p, bytes, Access::Write, HERE); }

// instrumented.h sends the compiler's own calls here.
void* cuda_emulator_memcpy(void* to, const void* from, size_t bytes) {
  check(from, bytes, Access::Read, HERE);
  check(to, bytes, Access::Write, HERE);
  return std::memcpy(to, from, bytes);
}
void* cuda_emulator_memmove(void* to, const void* from, size_t bytes) {
  check(from, bytes, Access::Read, HERE);
  check(to, bytes, Access::Write, HERE);
  return std::memmove(to, from, bytes);
}
void* cuda_emulator_memset(void* to, int value, size_t bytes) {
  check(to, bytes, Access::Write, HERE);
  return std::memset(to, value, bytes);
}

// As the sanitizer's own library declares them.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, check;
};
struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor *array, *index;
};
struct ShiftOutOfBounds {
  SourceLocation location;
  const TypeDescriptor *left, *right;
};

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t pointer) {
  if (!cuda_emulator::in_kernel()) return;
  cuda_emulator::fail(
      "misaligned access at %s:%u: expected an address that is a multiple of %u for"
      " %s, got %p",
      base_name(data->location.file), data->location.line, 1u << data->log_alignment,
      data->type->name, reinterpret_cast<void*>(pointer));
}
void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  if (!cuda_emulator::in_kernel()) return;
  cuda_emulator::fail("out of bounds index %td of %s at %s:%u", static_cast<ptrdiff_t>(index),
                      data->array->name, base_name(data->location.file), data->location.line);
}
// An x86 takes the count modulo the width, a GPU does not.
void __ubsan_handle_shift_out_of_bounds(ShiftOutOfBounds* data, uintptr_t, uintptr_t count) {
  if (!cuda_emulator::in_kernel()) return;
  cuda_emulator::fail("shift of %s by %td at %s:%u", data->left->name,
                      static_cast<ptrdiff_t>(count), base_name(data->location.file),
                      data->location.line);
}

}  // extern "C"
