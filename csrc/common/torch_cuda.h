#pragma once
// What op_cuda.cpp files need beside common/torch.h: the library and key they register for, the
// tensor's device made current, its stream, and launch errors.
#include "common/cuda.cuh"
#include "common/torch.h"

#if defined(SECATEUR_CUDA_EMULATOR)
// Emulated kernels run on CPU tensors, beside the CPU kernels of the same process.
#define SECATEUR_CUDA_LIBRARY secateur_emulated
#define SECATEUR_CUDA_KEY CPU
#else
#define SECATEUR_CUDA_LIBRARY secateur
#define SECATEUR_CUDA_KEY CUDA

// Only a torch with CUDA has it. Weak, so that any torch can load the library and tell its ops.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace secateur {

#if defined(SECATEUR_CUDA_EMULATOR)
class Device {
 public:
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
// Makes the device of `t` current for as long as it lives.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  // The stream that torch runs on there now.
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// What a launch returned; an error names `op`.
inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(
      error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction, op,
      ": expected a GPU of compute capability 8.0 or higher, got one that is not");
  STD_TORCH_CHECK(error == cudaSuccess, op, ": expected its CUDA kernel to start, got ",
                  cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace secateur
