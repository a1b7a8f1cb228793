#pragma once
// The only torch headers that op.cpp files include: the LibTorch stable ABI.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "common/dtype.h"
#include "common/view.h"

namespace secateur {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernel's name for a tensor's floating-point dtype; an error names `op` and `argument`.
inline Dtype dtype_of(const Tensor& t, const char* op, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::Float;
    case ScalarType::BFloat16:
      return Dtype::BFloat16;
    case ScalarType::Half:
      return Dtype::Half;
    case ScalarType::Double:
      return Dtype::Double;
    default:
      STD_TORCH_CHECK(false, op, ": expected ", argument,
                      " to be float32, bfloat16, float16 or float64, got ", t.scalar_type());
  }
  return Dtype::Float;
}

// "2, 3"
inline std::string joined(const std::vector<int64_t>& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return text;
}

// Uninitialized and contiguous, on the device of `like`. On a CPU torch::stable::new_empty would go
// by way of the dispatcher, which costs a small product as much as its checks.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  bool fits = true;
  for (size_t d = sizes.size(); d-- > 1;)
    fits &= !__builtin_mul_overflow(strides[d], std::max<int64_t>(sizes[d], 1), &strides[d - 1]);
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle tensor;
  STD_TORCH_CHECK(
      fits && aoti_torch_empty_strided(
                  static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                  device_type, like.get_device_index(), &tensor) == AOTI_TORCH_SUCCESS,
      "expected memory for a result of shape (", joined(sizes), "), got none");
  return Tensor(tensor);
}
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_tensor(like, sizes, like.scalar_type());
}

// `t` for a kernel that reads it; errors name `op` and `argument`.
inline View view_of(const Tensor& t, const char* op, const char* argument) {
  View view{const_cast<void*>(t.const_data_ptr()), dtype_of(t, op, argument), 0, {}, {}};
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 1) continue;
    const int last = view.ndim - 1;
    if (view.ndim > 0 && view.stride[last] == t.size(d) * t.stride(d)) {
      view.size[last] *= t.size(d);
      view.stride[last] = t.stride(d);
      continue;
    }
    STD_TORCH_CHECK(view.ndim < kMaxDims, op, ": expected ", argument, " to have at most ",
                    kMaxDims, " dimensions that cannot be merged, got a tensor of ", t.dim(),
                    " dimensions");
    view.size[view.ndim] = t.size(d);
    view.stride[view.ndim++] = t.stride(d);
  }
  if (view.ndim == 0) view.size[0] = view.stride[0] = view.ndim = 1;
  return view;
}

// The same for a kernel that writes to it.
inline View mutable_view_of(const Tensor& t, const char* op, const char* argument) {
  View view = view_of(t, op, argument);
  view.data = t.mutable_data_ptr();
  return view;
}

// Asks Linux for huge pages under large new memory: page by page, memory that is first written to
// takes longer to come than most sparse products take to write it.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const auto data = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The same for what this thread is about to write, where it is too small for huge pages: all pages
// at once, in place of an interrupt for each. Does nothing for pages that are there, or where Linux
// is older than 5.14.
inline void populate([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t page = 4 << 10;
  const auto data = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#endif
}

// While it lives, this thread takes denormals for what they are, whatever
// torch.set_flush_denormal() said: that holds for some threads only, so that scores, and with them
// counts, would depend on which thread they fell to.
class DenormalsKept {
 public:
  DenormalsKept() : mode_(mode()) { set_mode(mode_ & ~kFlushes); }
  ~DenormalsKept() { set_mode(mode_); }
  DenormalsKept(const DenormalsKept&) = delete;
  DenormalsKept& operator=(const DenormalsKept&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlushes = 0x8040;  // results and operands
  static uint64_t mode() { return _mm_getcsr(); }
  static void set_mode(uint64_t mode) { _mm_setcsr(static_cast<uint32_t>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlushes = uint64_t{1} << 24 | uint64_t{1} << 19;  // FZ and FZ16
  static uint64_t mode() {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode)); }
#else
  static constexpr uint64_t kFlushes = 0;
  static uint64_t mode() { return 0; }
  static void set_mode(uint64_t) {}
#endif
  uint64_t mode_;
};

// Calls f(begin, end) for pieces of 0..n on torch's threads, which keep denormals; a piece is a
// multiple of `grain`, but for the last. Threads take pieces as they get to them, so that one which
// wakes up late, or shares its core, holds up no more than its piece.
template <typename F>
void for_pieces(int64_t n, int64_t grain, const F& f) {
  constexpr int64_t pieces_per_thread = 16;
  const int64_t grains = (n + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), grains);
  const int64_t pieces = threads * pieces_per_thread;
  const int64_t piece = threads > 1 ? (grains + pieces - 1) / pieces * grain : n;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const DenormalsKept denormals;
    for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < n;)
      f(begin, std::min(n, begin + piece));
  });
}

}  // namespace secateur
