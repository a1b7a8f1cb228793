#include "fiber.h"

#include <cstdint>

#if defined(__x86_64__)
// void cuda_emulator_switch(void** from, void* to): pushes what the System V ABI lets a callee not
// change, leaves the stack pointer in *from, and goes on with what `to` left. swapcontext() would
// do, but makes a system call each time.
extern "C" void cuda_emulator_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .hidden cuda_emulator_switch
  .globl cuda_emulator_switch
  .type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_emulator_switch, . - cuda_emulator_switch
  .popsection
)");

namespace cuda_emulator {

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  // The six registers that the switch pops, the address it returns to, and an empty return address
  // for `entry`, which finds the stack as aligned as after a call.
  constexpr size_t kRegisters = 6;
  auto* const top = reinterpret_cast<uint64_t*>(static_cast<char*>(stack) + bytes);
  auto* const frame = top - kRegisters - 2;
  for (size_t i = 0; i < kRegisters; ++i) frame[i] = 0;
  frame[kRegisters] = reinterpret_cast<uint64_t>(entry);
  frame[kRegisters + 1] = 0;
  stack_pointer_ = frame;
}
void Fiber::resume() { cuda_emulator_switch(&resumer_, stack_pointer_); }
void Fiber::suspend() { cuda_emulator_switch(&stack_pointer_, resumer_); }

}  // namespace cuda_emulator
#else
namespace cuda_emulator {

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}
void Fiber::resume() { swapcontext(&resumer_, &context_); }
void Fiber::suspend() { swapcontext(&context_, &resumer_); }

}  // namespace cuda_emulator
#endif
