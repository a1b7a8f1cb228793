// What build.py calls through ctypes.
#include "checker.h"
#include "launch.h"

using namespace cuda_emulator;

extern "C" {

void cuda_emulator_set_seed(uint64_t seed) { set_seed(seed); }
void cuda_emulator_set_arrival(int when) { set_arrival(static_cast<Arrival>(when)); }
void cuda_emulator_set_accumulation(int how) { set_accumulation(static_cast<Accumulation>(how)); }
void cuda_emulator_counters(uint64_t* counters) {
  counters[0] = checker::bytes_read;
  counters[1] = checker::bytes_written;
  counters[2] = matrix_products();
  counters[3] = launches();
}
void cuda_emulator_add_buffer(const void* address, size_t bytes, bool initialised) {
  checker::add_buffer(address, bytes, initialised, true);
}
void cuda_emulator_forget_buffers() { checker::forget_buffers(); }

}  // extern "C"
