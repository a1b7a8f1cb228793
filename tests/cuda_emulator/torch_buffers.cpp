// Tells the checker of tensors, for libraries whose ops are written against torch's stable ABI.
// The linker sends the calls of that ABI that give an address away, or memory that holds nothing
// yet, here first (--wrap, see build.py).
#include <torch/csrc/stable/c/shim.h>

#include <cstring>

#include "checker.h"

namespace {

// The bytes from a tensor's first element to the end of its last.
void announce(AtenTensorHandle tensor, const void* data, bool initialised, bool reset) {
  int64_t dim = 0, numel = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_numel(tensor, &numel);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  if (numel == 0) return;
  int64_t elements = 1;
  for (int64_t d = 0; d < dim; ++d) elements += (sizes[d] - 1) * strides[d];
  cuda_emulator::checker::add_buffer(
      data, static_cast<size_t>(elements) * aoti_torch_dtype_element_size(dtype), initialised,
      reset);
}

void announce_new(AtenTensorHandle tensor, bool initialised) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  announce(tensor, data, initialised, true);
}

}  // namespace

extern "C" {

AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  if (!error) announce(tensor, *data, true, false);
  return error;
}

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  if (!error) announce(tensor, *data, true, false);
  return error;
}

#define ANNOUNCE_NEW(name, initialised)                                                          \
  AOTITorchError __real_##name(                                                                  \
      AtenTensorHandle self, const int64_t* size, int64_t dim, int32_t* dtype, int32_t* layout,  \
      int32_t* device, int32_t device_index, int32_t* pin_memory, AtenTensorHandle* result);     \
  AOTITorchError __wrap_##name(                                                                  \
      AtenTensorHandle self, const int64_t* size, int64_t dim, int32_t* dtype, int32_t* layout,  \
      int32_t* device, int32_t device_index, int32_t* pin_memory, AtenTensorHandle* result) {    \
    const AOTITorchError error =                                                                 \
        __real_##name(self, size, dim, dtype, layout, device, device_index, pin_memory, result); \
    if (!error) announce_new(*result, initialised);                                              \
    return error;                                                                                \
  }
ANNOUNCE_NEW(aoti_torch_aten_new_empty, false)
ANNOUNCE_NEW(aoti_torch_aten_new_zeros, true)
#undef ANNOUNCE_NEW

// Ops whose result is new memory, or old memory that they have filled.
AOTITorchError __real_torch_call_dispatcher(const char* name, const char* overload,
                                            StableIValue* stack, uint64_t version);
AOTITorchError __wrap_torch_call_dispatcher(const char* name, const char* overload,
                                            StableIValue* stack, uint64_t version) {
  const AOTITorchError error = __real_torch_call_dispatcher(name, overload, stack, version);
  const bool empty = std::strncmp(name, "aten::empty", 11) == 0;
  const bool fills = std::strcmp(name, "aten::zero_") == 0 ||
                     std::strcmp(name, "aten::copy_") == 0 || std::strcmp(name, "aten::full") == 0;
  if (!error && (empty || fills))
    announce_new(reinterpret_cast<AtenTensorHandle>(stack[0]), !empty);
  return error;
}

}  // extern "C"
