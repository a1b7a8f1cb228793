#include "ptx.h"

#include "checker.h"
#include "launch.h"

namespace cuda_emulator::ptx {
namespace {

// Linking this file turns the checker on: translated code says all that it does.
[[maybe_unused]] const bool turned_on = checker::enabled = true;

char* access(u64 address, unsigned bytes, checker::Access kind, const void* program_counter) {
  check_alignment(address, bytes, program_counter);
  char* const memory = pointer_to(address);
  checker::access(memory, bytes, kind, program_counter);
  return memory;
}

}  // namespace

void check_alignment(u64 address, unsigned bytes, const void* program_counter) {
  if (address % bytes)
    fail("misaligned access at %s: expected an address that is a multiple of %u, got %#lx",
         checker::location(program_counter).c_str(), bytes, address);
}

void out_of_local(const void* program_counter) {
  fail("out of bounds of the kernel's local arrays at %s",
       checker::location(program_counter).c_str());
}

char* load(u64 address, unsigned bytes) {
  return access(address, bytes, checker::Access::Read, __builtin_return_address(0));
}
char* load_read_only(u64 address, unsigned bytes) {
  const void* const program_counter = __builtin_return_address(0);
  checker::read_only(pointer_to(address), bytes, program_counter);
  return access(address, bytes, checker::Access::Read, program_counter);
}
char* store(u64 address, unsigned bytes) {
  return access(address, bytes, checker::Access::Write, __builtin_return_address(0));
}

}  // namespace cuda_emulator::ptx
