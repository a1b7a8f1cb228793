#include <algorithm>
#include <optional>

#include "block_sparse/block_sparse.h"
#include "common/torch.h"

namespace secateur::block_sparse {
namespace {

constexpr char kForward[] = "block_sparse_linear";
constexpr char kInputGradient[] = "block_sparse_linear_dx";
constexpr char kWeightGradient[] = "block_sparse_linear_dw";

struct Pattern {
  const Tensor &row_ptr, &col, &row_of, &col_ptr, &row_t, &position_t;
};

const int32_t* indices(const char* op, const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.dim() == 1 && t.size(0) == count,
      op, ": expected ", name, " to be ", count, " contiguous int32, got ", t.numel(), " ",
      t.scalar_type());
  return static_cast<const int32_t*>(t.const_data_ptr());
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The arguments that all three products share. Of the indices only number and dtype are checked:
// that they lie in the grid is for the caller, as Python's Pattern sees to, once and not every
// call.
Args make_args(const char* op, Product product, Dtype dtype, int64_t batch, int64_t out_features,
               int64_t in_features, int64_t rows, int64_t cols, const Pattern& pattern) {
  STD_TORCH_CHECK(rows > 0 && cols > 0, op, ": expected blocks of at least 1 x 1, got ", rows,
                  " x ", cols);
  Args args{};
  args.product = product;
  args.dtype = dtype;
  args.batch = batch;
  args.out_features = out_features;
  args.in_features = in_features;
  args.rows = rows;
  args.cols = cols;
  args.block_rows = ceil_div(out_features, rows);
  args.block_cols = ceil_div(in_features, cols);
  args.n_blocks = pattern.col.numel();
  args.row_ptr = indices(op, "row_ptr", pattern.row_ptr, args.block_rows + 1);
  args.col = indices(op, "col", pattern.col, args.n_blocks);
  args.row_of = indices(op, "row_of", pattern.row_of, args.n_blocks);
  args.col_ptr = indices(op, "col_ptr", pattern.col_ptr, args.block_cols + 1);
  args.row_t = indices(op, "row_t", pattern.row_t, args.n_blocks);
  args.position_t = indices(op, "position_t", pattern.position_t, args.n_blocks);
  return args;
}

void check_matrix(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": expected ", name, " to have 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": expected ", name, " to be ", dtype, ", got ",
                  t.scalar_type());
}

void check_values(const char* op, const Tensor& values, const Tensor& col, ScalarType dtype) {
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == col.numel(), op,
                  ": expected values of shape (", col.numel(), ", rows, cols), got ", values.dim(),
                  " dimensions and ", values.dim() > 0 ? values.size(0) : 0, " blocks");
  STD_TORCH_CHECK(values.scalar_type() == dtype, op, ": expected values to be ", dtype, ", got ",
                  values.scalar_type());
}

// Kernels read features with unit stride.
Tensor unit_stride(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

Tensor workspace(const Tensor& like, int64_t bytes) {
  const Tensor space = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  prefer_huge_pages(space);
  return space;
}

// Rows of the batch that are packed and multiplied at a time: what is packed is still in a cache
// when it is used, and the workspaces stay small. The last part takes what is left over.
constexpr int64_t kRowsAtOnce = 512;

void launch(const Args& args, const Tensor& like) {
  const int64_t parts = std::max<int64_t>(1, args.batch / kRowsAtOnce);
  const int64_t rows = parts == 1 ? args.batch : args.batch / parts / 64 * 64;
  const int64_t itemsize = like.element_size();
  const auto part_at = [&](int64_t i) {
    const int64_t m = i * rows;
    Args part = args;
    part.first_part = i == 0;
    part.last_part = i == parts - 1;
    part.batch = part.last_part ? args.batch - m : rows;
    part.x = static_cast<const char*>(args.x) + m * args.x_stride * itemsize;
    part.dy = static_cast<const char*>(args.dy) + m * args.dy_stride * itemsize;
    if (args.product == Product::Forward)
      part.out = static_cast<char*>(args.out) + m * args.out_features * itemsize;
    if (args.product == Product::InputGradient)
      part.out = static_cast<char*>(args.out) + m * args.in_features * itemsize;
    part.plan = SECATEUR_FOR_ISA(make_plan)(part);
    return part;
  };
  const Plan largest = part_at(parts - 1).plan;
  const Tensor x = workspace(like, largest.x_bytes);
  const Tensor dy = workspace(like, largest.dy_bytes);
  const Tensor values = workspace(like, largest.values_bytes);
  for (int64_t i = 0; i < parts; ++i) {
    Args part = part_at(i);
    part.x_space = x.mutable_data_ptr();
    part.dy_space = dy.mutable_data_ptr();
    part.values_space = largest.values_bytes ? values.mutable_data_ptr() : nullptr;
    const auto parallel = [&](const Stage& stage, RunStage* run) {
      torch::stable::parallel_for(0, stage.items, stage.grain,
                                  [&](int64_t begin, int64_t end) { run(part, begin, end); });
    };
    parallel(part.plan.pack_x, SECATEUR_FOR_ISA(pack_x));
    parallel(part.plan.pack_dy, SECATEUR_FOR_ISA(pack_dy));
    if (part.first_part) parallel(part.plan.pack_values, SECATEUR_FOR_ISA(pack_values));
    parallel(part.plan.run, SECATEUR_FOR_ISA(run));
  }
}

Tensor forward_cpu(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                   const Tensor& row_ptr, const Tensor& col, const Tensor& row_of,
                   const Tensor& col_ptr, const Tensor& row_t, const Tensor& position_t,
                   int64_t out_features) {
  const Dtype dtype = dtype_of(x, kForward, "x");
  check_matrix(kForward, "x", x, x.scalar_type());
  check_values(kForward, values, col, x.scalar_type());
  if (bias)
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == out_features && bias->scalar_type() == x.scalar_type(),
        kForward, ": expected bias to be ", out_features, " ", x.scalar_type(), ", got ",
        bias->numel(), " ", bias->scalar_type());
  Args args =
      make_args(kForward, Product::Forward, dtype, x.size(0), out_features, x.size(1),
                values.size(1), values.size(2), {row_ptr, col, row_of, col_ptr, row_t, position_t});
  Tensor y = torch::stable::new_empty(x, {args.batch, args.out_features});
  if (y.numel() == 0) return y;
  prefer_huge_pages(y);
  const Tensor left = unit_stride(x), blocks = torch::stable::contiguous(values);
  const Tensor offset = bias ? torch::stable::contiguous(*bias) : y;
  args.x = left.const_data_ptr();
  args.x_stride = left.stride(0);
  args.values = blocks.const_data_ptr();
  args.bias = bias ? offset.const_data_ptr() : nullptr;
  args.out = y.mutable_data_ptr();
  launch(args, x);
  return y;
}

Tensor input_gradient_cpu(const Tensor& dy, const Tensor& values, const Tensor& row_ptr,
                          const Tensor& col, const Tensor& row_of, const Tensor& col_ptr,
                          const Tensor& row_t, const Tensor& position_t, int64_t in_features) {
  const Dtype dtype = dtype_of(dy, kInputGradient, "dy");
  check_matrix(kInputGradient, "dy", dy, dy.scalar_type());
  check_values(kInputGradient, values, col, dy.scalar_type());
  Args args =
      make_args(kInputGradient, Product::InputGradient, dtype, dy.size(0), dy.size(1), in_features,
                values.size(1), values.size(2), {row_ptr, col, row_of, col_ptr, row_t, position_t});
  Tensor dx = torch::stable::new_empty(dy, {args.batch, args.in_features});
  if (dx.numel() == 0) return dx;
  prefer_huge_pages(dx);
  const Tensor left = unit_stride(dy), blocks = torch::stable::contiguous(values);
  args.dy = left.const_data_ptr();
  args.dy_stride = left.stride(0);
  args.values = blocks.const_data_ptr();
  args.out = dx.mutable_data_ptr();
  launch(args, dy);
  return dx;
}

Tensor weight_gradient_cpu(const Tensor& dy, const Tensor& x, const Tensor& row_ptr,
                           const Tensor& col, const Tensor& row_of, const Tensor& col_ptr,
                           const Tensor& row_t, const Tensor& position_t, int64_t rows,
                           int64_t cols) {
  const Dtype dtype = dtype_of(dy, kWeightGradient, "dy");
  check_matrix(kWeightGradient, "dy", dy, dy.scalar_type());
  check_matrix(kWeightGradient, "x", x, dy.scalar_type());
  STD_TORCH_CHECK(x.size(0) == dy.size(0), kWeightGradient, ": expected x to have ", dy.size(0),
                  " rows, as dy, got ", x.size(0));
  Args args = make_args(kWeightGradient, Product::WeightGradient, dtype, dy.size(0), dy.size(1),
                        x.size(1), rows, cols, {row_ptr, col, row_of, col_ptr, row_t, position_t});
  Tensor dw = torch::stable::new_empty(dy, {args.n_blocks, rows, cols});
  if (args.n_blocks == 0) return dw;
  prefer_huge_pages(dw);
  const Tensor left = unit_stride(dy), right = unit_stride(x);
  args.dy = left.const_data_ptr();
  args.dy_stride = left.stride(0);
  args.x = right.const_data_ptr();
  args.x_stride = right.stride(0);
  args.out = dw.mutable_data_ptr();
  launch(args, dy);
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "block_sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor col, "
      "Tensor row_of, Tensor col_ptr, Tensor row_t, Tensor position_t, int out_features) -> "
      "Tensor");
  m.def(
      "block_sparse_linear_dx(Tensor dy, Tensor values, Tensor row_ptr, Tensor col, Tensor row_of, "
      "Tensor col_ptr, Tensor row_t, Tensor position_t, int in_features) -> Tensor");
  m.def(
      "block_sparse_linear_dw(Tensor dy, Tensor x, Tensor row_ptr, Tensor col, Tensor row_of, "
      "Tensor col_ptr, Tensor row_t, Tensor position_t, int rows, int cols) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("block_sparse_linear", TORCH_BOX(&forward_cpu));
  m.impl("block_sparse_linear_dx", TORCH_BOX(&input_gradient_cpu));
  m.impl("block_sparse_linear_dw", TORCH_BOX(&weight_gradient_cpu));
}

}  // namespace secateur::block_sparse
