#pragma once
// A fiber: a function with a stack of its own that can be left in the middle and gone on with.
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_emulator {

class Fiber {
 public:
  // Makes the next resume() call `entry`, on this stack; `entry` must not return.
  void start(void* stack, size_t bytes, void (*entry)());
  // Runs the fiber until it suspends.
  void resume();
  // From within the fiber: goes back to where it was resumed.
  void suspend();

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
  void* resumer_ = nullptr;
#else
  ucontext_t context_;
  ucontext_t resumer_;
#endif
};

}  // namespace cuda_emulator
