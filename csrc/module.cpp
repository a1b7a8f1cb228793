// secateur._C: importing it registers torch.ops.secateur.*. What it exposes itself is what is not
// a tensor op (the choice of instruction set, build information), and mask_memory_.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "block_sparse/block_sparse.h"
#include "common/isa.h"
#include "mask/mask.h"

namespace {

using secateur::Isa;

struct Level {
  const char* name;
  Isa isa;
  bool supported;
};

// Ascending; every level includes the ones before it.
std::vector<Level> levels() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return {{"BASE", Isa::BASE, true},
          {"AVX2", Isa::AVX2, avx2},
          {"AVX512", Isa::AVX512, avx512},
          {"AVX512_BF16", Isa::AVX512_BF16, bf16}};
#else
  return {{"BASE", Isa::BASE, true}};
#endif
}

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.supported) names.emplace_back(level.name);
  return names;
}

void set_isa(const std::string& name) {
  std::string expected;
  for (const Level& level : levels()) {
    if (!level.supported) continue;
    if (name == level.name) {
      secateur::current_isa = level.isa;
      return;
    }
    expected += (expected.empty() ? "" : ", ") + std::string(level.name);
  }
  throw pybind11::value_error("expected an instruction set this CPU has (" + expected + "), got '" +
                              name + "'");
}

std::string isa() {
  for (const Level& level : levels())
    if (level.isa == secateur::current_isa) return level.name;
  return "BASE";
}

// mask_ of one contiguous tensor, for the caller that cannot afford the dispatcher.
bool mask_memory(uintptr_t data, int64_t itemsize, int64_t numel, uintptr_t bits) {
  using secateur::Dtype;
  const Dtype dtype = itemsize == 2 ? Dtype::Half : itemsize == 4 ? Dtype::Float : Dtype::Double;
  const secateur::View view{reinterpret_cast<void*>(data), dtype, 1, {numel}, {1}};
  return numel > 0 &&
         secateur::mask::apply_all(view, numel, reinterpret_cast<const uint8_t*>(bits));
}

int64_t multiply_registers(bool bfloat16, int64_t rounds) {
  using namespace secateur::block_sparse;
  using secateur::Dtype;
  float value = 0;
  return SECATEUR_FOR_ISA(multiply_registers)(bfloat16 ? Dtype::BFloat16 : Dtype::Float, rounds,
                                              &value);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "secateur's compiled half: importing it registers torch.ops.secateur";
  m.def("supported_isas", &supported, "Instruction sets of this build that this CPU can run.");
  m.def("isa", &isa, "The instruction set whose kernels run now.");
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Choose the instruction set of the kernels.");
  m.def("mask_memory_", &mask_memory, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "mask_ of numel contiguous elements at an address, by the bits at another; unchecked.");
  m.def("multiply_registers", &multiply_registers,
        pybind11::call_guard<pybind11::gil_scoped_release>(), pybind11::arg("bfloat16"),
        pybind11::arg("rounds"),
        "Multiply-adds of values in registers, on this thread; how many FLOP they were.");
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = SECATEUR_VERSION;
        info["torch"] = SECATEUR_TORCH_VERSION;
        info["compiler"] = __VERSION__;
        info["cuda"] = SECATEUR_CUDA_BUILD;
        return info;
      },
      "Versions this binary was built with.");
}
