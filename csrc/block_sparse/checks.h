#pragma once
// What the ops of every device check alike; for op.cpp and op_cuda.cpp.
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "block_sparse/block_sparse.h"
#include "common/torch.h"

namespace secateur::block_sparse {

constexpr char kForward[] = "block_sparse_linear";
constexpr char kInputGradient[] = "block_sparse_linear_dx";
constexpr char kWeightGradient[] = "block_sparse_linear_dw";
constexpr char kBackward[] = "block_sparse_linear_backward";

struct Pattern {
  const Tensor &row_ptr, &col, &row_of, &col_ptr, &row_t, &position_t;
};

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.device() == like.device(), op,
                  ": expected all tensors to be on one device, got ", name, " on another one");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": expected ", name, " to be ",
                  like.scalar_type(), ", got ", t.scalar_type());
}

// `like` is X or dY, whose dtype and device the others have.
inline void check_matrix(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": expected ", name, " to have 2 dimensions, got ", t.dim());
  check_dtype(op, name, t, like);
  check_device(op, name, t, like);
}

inline void check_values(const char* op, const Tensor& values, const Tensor& col,
                         const Tensor& like) {
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == col.numel(), op,
                  ": expected values of shape (", col.numel(), ", rows, cols), got ", values.dim(),
                  " dimensions and ", values.dim() > 0 ? values.size(0) : 0, " blocks");
  check_dtype(op, "values", values, like);
  check_device(op, "values", values, like);
}

inline const int32_t* indices(const char* op, const char* name, const Tensor& t, int64_t count,
                              const Tensor& like) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.dim() == 1 && t.size(0) == count,
      op, ": expected ", name, " to be ", count, " contiguous int32, got ", t.numel(), " ",
      t.scalar_type());
  check_device(op, name, t, like);
  return static_cast<const int32_t*>(t.const_data_ptr());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What all three products share; `left` is X or dY. Of the indices only number, dtype and device
// are checked: that they lie in the grid is for the caller, as Python's Pattern sees to, once and
// not every call.
inline Problem make_problem(const char* op, Product product, Dtype dtype, const Tensor& left,
                            int64_t out_features, int64_t in_features, int64_t rows, int64_t cols,
                            const Pattern& pattern) {
  STD_TORCH_CHECK(rows > 0 && cols > 0, op, ": expected blocks of at least 1 x 1, got ", rows,
                  " x ", cols);
  Problem p{};
  p.product = product;
  p.dtype = dtype;
  p.batch = left.size(0);
  p.out_features = out_features;
  p.in_features = in_features;
  p.rows = rows;
  p.cols = cols;
  p.block_rows = ceil_div(out_features, rows);
  p.block_cols = ceil_div(in_features, cols);
  p.n_blocks = pattern.col.numel();
  p.row_ptr = indices(op, "row_ptr", pattern.row_ptr, p.block_rows + 1, left);
  p.col = indices(op, "col", pattern.col, p.n_blocks, left);
  p.row_of = indices(op, "row_of", pattern.row_of, p.n_blocks, left);
  p.col_ptr = indices(op, "col_ptr", pattern.col_ptr, p.block_cols + 1, left);
  p.row_t = indices(op, "row_t", pattern.row_t, p.n_blocks, left);
  p.position_t = indices(op, "position_t", pattern.position_t, p.n_blocks, left);
  return p;
}

// Kernels read features with unit stride.
inline Tensor unit_stride(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// A product, what it is computed into, and the tensors that it points into.
struct Call {
  Problem problem;
  Tensor out;
  std::vector<Tensor> inputs;
};

inline Call call_of(const Problem& problem, const Tensor& like,
                    std::initializer_list<int64_t> shape, std::vector<Tensor> inputs) {
  Call call{problem, new_tensor(like, shape), std::move(inputs)};
  (problem.product == Product::WeightGradient ? call.problem.dw : call.problem.out) =
      call.out.mutable_data_ptr();
  return call;
}

inline Call forward(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                    const Pattern& pattern, int64_t out_features,
                    const std::optional<std::string>& activation) {
  const Dtype dtype = dtype_of(x, kForward, "x");
  check_matrix(kForward, "x", x, x);
  check_values(kForward, values, pattern.col, x);
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == out_features && bias->scalar_type() == x.scalar_type(),
        kForward, ": expected bias to be ", out_features, " ", x.scalar_type(), ", got ",
        bias->numel(), " ", bias->scalar_type());
    check_device(kForward, "bias", *bias, x);
  }
  STD_TORCH_CHECK(!activation || *activation == "relu" || *activation == "gelu", kForward,
                  ": expected activation to be None, 'relu' or 'gelu', got '", *activation, "'");
  Problem p = make_problem(kForward, Product::Forward, dtype, x, out_features, x.size(1),
                           values.size(1), values.size(2), pattern);
  const Tensor left = unit_stride(x), blocks = torch::stable::contiguous(values);
  const Tensor offset = bias ? torch::stable::contiguous(*bias) : blocks;
  p.x = left.const_data_ptr();
  p.x_stride = left.stride(0);
  p.values = blocks.const_data_ptr();
  p.bias = bias ? offset.const_data_ptr() : nullptr;
  p.activation = !activation             ? Activation::None
                 : *activation == "relu" ? Activation::Relu
                                         : Activation::Gelu;
  return call_of(p, x, {p.batch, p.out_features}, {left, blocks, offset});
}

inline Call input_gradient(const char* op, const Tensor& dy, const Tensor& values,
                           const Pattern& pattern, int64_t in_features) {
  const Dtype dtype = dtype_of(dy, op, "dy");
  check_matrix(op, "dy", dy, dy);
  check_values(op, values, pattern.col, dy);
  Problem p = make_problem(op, Product::InputGradient, dtype, dy, dy.size(1), in_features,
                           values.size(1), values.size(2), pattern);
  const Tensor left = unit_stride(dy), blocks = torch::stable::contiguous(values);
  p.dy = left.const_data_ptr();
  p.dy_stride = left.stride(0);
  p.values = blocks.const_data_ptr();
  return call_of(p, dy, {p.batch, p.in_features}, {left, blocks});
}

inline Call weight_gradient(const char* op, const Tensor& dy, const Tensor& x,
                            const Pattern& pattern, int64_t rows, int64_t cols) {
  const Dtype dtype = dtype_of(dy, op, "dy");
  check_matrix(op, "dy", dy, dy);
  check_matrix(op, "x", x, dy);
  STD_TORCH_CHECK(x.size(0) == dy.size(0), op, ": expected x to have ", dy.size(0),
                  " rows, as dy, got ", x.size(0));
  Problem p = make_problem(op, Product::WeightGradient, dtype, dy, dy.size(1), x.size(1), rows,
                           cols, pattern);
  const Tensor left = unit_stride(dy), right = unit_stride(x);
  p.dy = left.const_data_ptr();
  p.dy_stride = left.stride(0);
  p.x = right.const_data_ptr();
  p.x_stride = right.stride(0);
  return call_of(p, dy, {p.n_blocks, rows, cols}, {left, right});
}

// Both of one dY, which is made contiguous once.
struct BackwardCalls {
  Call dx, dw;
};

inline BackwardCalls backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                              const Pattern& pattern) {
  check_matrix(kBackward, "dy", dy, dy);
  check_matrix(kBackward, "x", x, dy);
  const Tensor left = unit_stride(dy);
  Call dx = input_gradient(kBackward, left, values, pattern, x.size(1));
  return {std::move(dx),
          weight_gradient(kBackward, left, x, pattern, values.size(1), values.size(2))};
}

}  // namespace secateur::block_sparse
