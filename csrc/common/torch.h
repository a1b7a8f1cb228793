#pragma once
// The only torch headers that op.cpp files include: the LibTorch stable ABI.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/dtype.h"

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

}  // namespace secateur
