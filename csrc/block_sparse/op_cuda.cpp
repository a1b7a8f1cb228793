#include <optional>
#include <string>
#include <tuple>

#include "block_sparse/block_sparse.h"
#include "block_sparse/checks.h"
#include "common/torch_cuda.h"

namespace secateur::block_sparse {
namespace {

Tensor launch(const char* op, Call call) {
  const Problem& problem = call.problem;
  // Kernels count features in 32 bits; all else in 64.
  constexpr int64_t limit = int64_t{1} << 31;
  STD_TORCH_CHECK(
      problem.block_rows * problem.rows < limit && problem.block_cols * problem.cols < limit, op,
      ": expected fewer than 2**31 features in blocks, got a weight of ", problem.out_features,
      " x ", problem.in_features, " in blocks of ", problem.rows, " x ", problem.cols);
  if (call.out.numel() == 0) return call.out;
  const Device device(call.out);
  if (problem.batch == 0) return torch::stable::zero_(call.out);
  const int64_t bytes = CUDA::workspace_bytes(problem);
  Tensor workspace = new_tensor(call.out, {bytes}, ScalarType::Byte);
  check_launch(
      op, CUDA::run(problem, bytes > 0 ? workspace.mutable_data_ptr() : nullptr, device.stream()));
  return call.out;
}

Tensor forward_cuda(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                    const Tensor& row_ptr, const Tensor& col, const Tensor& row_of,
                    const Tensor& col_ptr, const Tensor& row_t, const Tensor& position_t,
                    int64_t out_features, const std::optional<std::string>& activation) {
  return launch(kForward,
                forward(x, values, bias, {row_ptr, col, row_of, col_ptr, row_t, position_t},
                        out_features, activation));
}

Tensor input_gradient_cuda(const Tensor& dy, const Tensor& values, const Tensor& row_ptr,
                           const Tensor& col, const Tensor& row_of, const Tensor& col_ptr,
                           const Tensor& row_t, const Tensor& position_t, int64_t in_features) {
  return launch(kInputGradient,
                input_gradient(kInputGradient, dy, values,
                               {row_ptr, col, row_of, col_ptr, row_t, position_t}, in_features));
}

Tensor weight_gradient_cuda(const Tensor& dy, const Tensor& x, const Tensor& row_ptr,
                            const Tensor& col, const Tensor& row_of, const Tensor& col_ptr,
                            const Tensor& row_t, const Tensor& position_t, int64_t rows,
                            int64_t cols) {
  return launch(kWeightGradient,
                weight_gradient(kWeightGradient, dy, x,
                                {row_ptr, col, row_of, col_ptr, row_t, position_t}, rows, cols));
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& dy, const Tensor& x, const Tensor& values,
                                         const Tensor& row_ptr, const Tensor& col,
                                         const Tensor& row_of, const Tensor& col_ptr,
                                         const Tensor& row_t, const Tensor& position_t) {
  const Pattern pattern{row_ptr, col, row_of, col_ptr, row_t, position_t};
  const auto [dx, dw] = backward(dy, x, values, pattern);
  return {launch(kBackward, dx), launch(kBackward, dw)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SECATEUR_CUDA_LIBRARY, SECATEUR_CUDA_KEY, m) {
  m.impl("block_sparse_linear", TORCH_BOX(&forward_cuda));
  m.impl("block_sparse_linear_dx", TORCH_BOX(&input_gradient_cuda));
  m.impl("block_sparse_linear_dw", TORCH_BOX(&weight_gradient_cuda));
  m.impl("block_sparse_linear_backward", TORCH_BOX(&backward_cuda));
}

}  // namespace secateur::block_sparse
