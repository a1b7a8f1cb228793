#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "block_sparse/block_sparse.h"
#include "common/torch.h"

namespace secateur::block_sparse {
namespace {

constexpr char kForward[] = "block_sparse_linear";
constexpr char kInputGradient[] = "block_sparse_linear_dx";
constexpr char kWeightGradient[] = "block_sparse_linear_dw";
constexpr char kBackward[] = "block_sparse_linear_backward";

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

// The batch is multiplied in two halves at a time, each in parts; a small one is a single half. A
// part is small enough for what is packed of it to be still in a cache when it is used. A half
// packs for itself and is worked on by as few threads as can be: memory that one core has packed
// and another one has read takes the first one far longer to write to again.
constexpr int64_t kRowsAtOnce = 128;
constexpr int64_t kMaxHalves = 2;  // each has values and sums of its own

// One product: what launch() computes into `out`, and the tensors that its arguments point into.
struct Call {
  Args args;
  Tensor out;
  std::vector<Tensor> inputs;
};

Call call_of(const Args& args, const Tensor& like, std::initializer_list<int64_t> shape,
             std::vector<Tensor> inputs) {
  Call call{args, torch::stable::new_empty(like, shape), std::move(inputs)};
  void* const memory = call.out.mutable_data_ptr();
  (args.product == Product::WeightGradient ? call.args.dw : call.args.out) = memory;
  prefer_huge_pages(memory, call.out.numel() * call.out.element_size());
  return call;
}

// Parts are whole panels of so many rows, but for the last one.
Args part_of(const Args& args, int64_t index, int64_t parts, int64_t panel, int64_t itemsize) {
  const int64_t panels = ceil_div(args.batch, panel);
  const int64_t m = index * panels / parts * panel;
  const auto at_row = [&](const void* data, int64_t stride) {
    return static_cast<const char*>(data) + m * stride * itemsize;
  };
  Args part = args;
  part.batch = std::min((index + 1) * panels / parts * panel, args.batch) - m;
  part.x = at_row(args.x, args.x_stride);
  part.dy = at_row(args.dy, args.dy_stride);
  if (args.out)
    part.out = const_cast<char*>(
        at_row(args.out, args.product == Product::Forward ? args.out_features : args.in_features));
  part.plan = SECATEUR_FOR_ISA(make_plan)(part);
  return part;
}

// Whether `second` may take dY as it was packed for `first`.
bool same_packed_dy(const Plan& first, const Plan& second) {
  return first.dy == Layout::Transposed && second.dy == Layout::Transposed &&
         first.panel == second.panel && first.pairs == second.pairs;
}

// Memory of the calling thread for what launch() packs. It stays with the thread, as large as its
// largest call needed: new pages at every call would take as long as the packing itself.
class Workspace {
 public:
  // Cleared by the next call.
  char* of(int64_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = 0;
      memory_.reset(::operator new(bytes, kAlignment));
      bytes_ = bytes;
      prefer_huge_pages(memory_.get(), bytes);
    }
    return static_cast<char*>(memory_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<void, Delete> memory_;
  int64_t bytes_ = 0;
};

using Halves = std::vector<Args>;

// Items of a stage are those of the first half and then those of the next.
void run_stage(const Halves& halves, Stage Plan::* stage, RunStage* run) {
  int64_t items = 0;
  for (const Args& half : halves) items += (half.plan.*stage).items;
  const auto range = [&](int64_t begin, int64_t end) {
    for (const Args& half : halves) {
      const int64_t count = (half.plan.*stage).items;
      const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, count);
      if (first < last) run(half, first, last);
      begin -= count;
      end -= count;
    }
  };
  torch::stable::parallel_for(0, items, (halves[0].plan.*stage).grain, range);
}

// Workspaces of all halves of all calls; dY as it was packed for the first call serves the others
// where `shared` says so.
void reserve(std::vector<Halves>& calls, const std::vector<bool>& shared, bool copy_values) {
  int64_t bytes = 0;
  std::vector<std::pair<void**, int64_t>> places;
  const auto place = [&](void*& space, int64_t size) {
    if (size == 0) return;
    places.emplace_back(&space, bytes);
    bytes += ceil_div(size, 64) * 64;
  };
  for (size_t c = 0; c < calls.size(); ++c) {
    for (Args& half : calls[c]) {
      const bool first = &half == &calls[c][0];
      place(half.x_space, half.plan.x_bytes);
      if (!shared[c]) place(half.dy_space, half.plan.dy_bytes);
      if (first || copy_values) place(half.values_space, half.plan.values_bytes);
      if (first && half.plan.sums_are_dw)
        half.sums = half.dw;
      else
        place(half.sums, half.plan.sums_bytes);
    }
  }
  thread_local Workspace workspace;
  char* const memory = workspace.of(bytes);
  for (const auto& [space, offset] : places) *space = memory + offset;
  for (size_t c = 0; c < calls.size(); ++c) {
    for (size_t h = 0; h < calls[c].size(); ++h) {
      if (shared[c]) calls[c][h].dy_space = calls[0][h].dy_space;
      if (!copy_values) calls[c][h].values_space = calls[c][0].values_space;
    }
  }
}

// One product, or dX and dW of the same dY.
void launch(std::vector<Call> calls) {
  std::erase_if(calls, [](const Call& call) { return call.out.numel() == 0; });
  if (calls.empty()) return;
  const int64_t itemsize = calls[0].out.element_size(), batch = calls[0].args.batch;
  const int64_t halves = std::clamp<int64_t>(batch / kBatchLanes, 1, kMaxHalves);
  const int64_t steps = std::max<int64_t>(1, batch / (halves * kRowsAtOnce));
  const int64_t threads = torch::stable::get_num_threads();
  const bool copy_values = threads > 1;
  int64_t panel = 1;  // rows
  for (const Call& call : calls)
    panel = std::max(panel, SECATEUR_FOR_ISA(make_plan)(call.args).panel);
  const int64_t panels = ceil_div(batch, panel);
  std::vector<Halves> all;
  std::vector<bool> shared;
  for (const Call& call : calls) {
    Args whole = call.args, largest = call.args;
    largest.batch = std::min(batch, ceil_div(panels, halves * steps) * panel);
    whole.plan = SECATEUR_FOR_ISA(make_plan)(largest);
    shared.push_back(!all.empty() && same_packed_dy(all[0][0].plan, whole.plan));
    all.emplace_back(halves, whole);
  }
  reserve(all, shared, copy_values);

  const auto multiply = [&](int64_t first, int64_t last) {  // halves
    for (int64_t step = 0; step < steps; ++step) {
      for (size_t c = 0; c < calls.size(); ++c) {
        Halves parts(all[c].begin() + first, all[c].begin() + last);
        for (int64_t h = first; h < last; ++h) {
          Args& part = parts[h - first];
          part = part_of(part, h * steps + step, halves * steps, panel, itemsize);
          part.first_part = step == 0;
        }
        run_stage(parts, &Plan::pack_x, SECATEUR_FOR_ISA(pack_x));
        if (!shared[c]) run_stage(parts, &Plan::pack_dy, SECATEUR_FOR_ISA(pack_dy));
        if (step == 0)
          run_stage(copy_values ? parts : Halves{parts[0]}, &Plan::pack_values,
                    SECATEUR_FOR_ISA(pack_values));
        run_stage(parts, &Plan::run, SECATEUR_FOR_ISA(run));
      }
    }
  };
  // A thread that has a half to itself meets the others only at the end.
  const bool alike = panels % halves == 0 || panels >= 8 * halves;
  if (threads == halves && alike)
    torch::stable::parallel_for(0, halves, 1, multiply);
  else
    multiply(0, halves);
  for (const Halves& call : all) {
    if (halves == 1 && call[0].plan.sums_are_dw) continue;
    Args sum = call[0];
    if (halves > 1) sum.other_sums = call[1].sums;
    run_stage({sum}, &Plan::finish, SECATEUR_FOR_ISA(finish));
  }
}

Call forward(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
             const Pattern& pattern, int64_t out_features,
             const std::optional<std::string>& activation) {
  const Dtype dtype = dtype_of(x, kForward, "x");
  check_matrix(kForward, "x", x, x.scalar_type());
  check_values(kForward, values, pattern.col, x.scalar_type());
  if (bias)
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == out_features && bias->scalar_type() == x.scalar_type(),
        kForward, ": expected bias to be ", out_features, " ", x.scalar_type(), ", got ",
        bias->numel(), " ", bias->scalar_type());
  Args args = make_args(kForward, Product::Forward, dtype, x.size(0), out_features, x.size(1),
                        values.size(1), values.size(2), pattern);
  const Tensor left = unit_stride(x), blocks = torch::stable::contiguous(values);
  const Tensor offset = bias ? torch::stable::contiguous(*bias) : blocks;
  args.x = left.const_data_ptr();
  args.x_stride = left.stride(0);
  args.values = blocks.const_data_ptr();
  args.bias = bias ? offset.const_data_ptr() : nullptr;
  STD_TORCH_CHECK(!activation || *activation == "relu" || *activation == "gelu", kForward,
                  ": expected activation to be None, 'relu' or 'gelu', got '", *activation, "'");
  args.activation = !activation             ? Activation::None
                    : *activation == "relu" ? Activation::Relu
                                            : Activation::Gelu;
  return call_of(args, x, {args.batch, args.out_features}, {left, blocks, offset});
}

Call input_gradient(const char* op, const Tensor& dy, const Tensor& values, const Pattern& pattern,
                    int64_t in_features) {
  const Dtype dtype = dtype_of(dy, op, "dy");
  check_matrix(op, "dy", dy, dy.scalar_type());
  check_values(op, values, pattern.col, dy.scalar_type());
  Args args = make_args(op, Product::InputGradient, dtype, dy.size(0), dy.size(1), in_features,
                        values.size(1), values.size(2), pattern);
  const Tensor left = unit_stride(dy), blocks = torch::stable::contiguous(values);
  args.dy = left.const_data_ptr();
  args.dy_stride = left.stride(0);
  args.values = blocks.const_data_ptr();
  return call_of(args, dy, {args.batch, args.in_features}, {left, blocks});
}

Call weight_gradient(const char* op, const Tensor& dy, const Tensor& x, const Pattern& pattern,
                     int64_t rows, int64_t cols) {
  const Dtype dtype = dtype_of(dy, op, "dy");
  check_matrix(op, "dy", dy, dy.scalar_type());
  check_matrix(op, "x", x, dy.scalar_type());
  STD_TORCH_CHECK(x.size(0) == dy.size(0), op, ": expected x to have ", dy.size(0),
                  " rows, as dy, got ", x.size(0));
  Args args = make_args(op, Product::WeightGradient, dtype, dy.size(0), dy.size(1), x.size(1), rows,
                        cols, pattern);
  const Tensor left = unit_stride(dy), right = unit_stride(x);
  args.dy = left.const_data_ptr();
  args.dy_stride = left.stride(0);
  args.x = right.const_data_ptr();
  args.x_stride = right.stride(0);
  return call_of(args, dy, {args.n_blocks, rows, cols}, {left, right});
}

Tensor forward_cpu(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                   const Tensor& row_ptr, const Tensor& col, const Tensor& row_of,
                   const Tensor& col_ptr, const Tensor& row_t, const Tensor& position_t,
                   int64_t out_features, const std::optional<std::string>& activation) {
  const Call y = forward(x, values, bias, {row_ptr, col, row_of, col_ptr, row_t, position_t},
                         out_features, activation);
  launch({y});
  return y.out;
}

Tensor input_gradient_cpu(const Tensor& dy, const Tensor& values, const Tensor& row_ptr,
                          const Tensor& col, const Tensor& row_of, const Tensor& col_ptr,
                          const Tensor& row_t, const Tensor& position_t, int64_t in_features) {
  const Call dx = input_gradient(kInputGradient, dy, values,
                                 {row_ptr, col, row_of, col_ptr, row_t, position_t}, in_features);
  launch({dx});
  return dx.out;
}

Tensor weight_gradient_cpu(const Tensor& dy, const Tensor& x, const Tensor& row_ptr,
                           const Tensor& col, const Tensor& row_of, const Tensor& col_ptr,
                           const Tensor& row_t, const Tensor& position_t, int64_t rows,
                           int64_t cols) {
  const Call dw = weight_gradient(kWeightGradient, dy, x,
                                  {row_ptr, col, row_of, col_ptr, row_t, position_t}, rows, cols);
  launch({dw});
  return dw.out;
}

// dX and dW at once: dY is read and packed once.
std::tuple<Tensor, Tensor> backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& values,
                                        const Tensor& row_ptr, const Tensor& col,
                                        const Tensor& row_of, const Tensor& col_ptr,
                                        const Tensor& row_t, const Tensor& position_t) {
  const Pattern pattern{row_ptr, col, row_of, col_ptr, row_t, position_t};
  check_matrix(kBackward, "dy", dy, dy.scalar_type());
  check_matrix(kBackward, "x", x, dy.scalar_type());
  const Tensor left = unit_stride(dy);
  Call dx = input_gradient(kBackward, left, values, pattern, x.size(1));
  Call dw = weight_gradient(kBackward, left, x, pattern, values.size(1), values.size(2));
  if (values.size(1) == 1 && values.size(2) == 1 && dx.out.numel() > 0 && dw.out.numel() > 0) {
    Call both = dx;
    both.args.product = Product::Backward;
    both.args.x = dw.args.x;
    both.args.x_stride = dw.args.x_stride;
    both.args.dw = dw.args.dw;
    launch({both});
  } else {
    dx.args.shares_dy = dw.args.shares_dy = true;
    launch({dx, dw});
  }
  return {dx.out, dw.out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(secateur, m) {
  m.def(
      "block_sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor col, "
      "Tensor row_of, Tensor col_ptr, Tensor row_t, Tensor position_t, int out_features, str? "
      "activation=None) -> Tensor");
  m.def(
      "block_sparse_linear_dx(Tensor dy, Tensor values, Tensor row_ptr, Tensor col, Tensor row_of, "
      "Tensor col_ptr, Tensor row_t, Tensor position_t, int in_features) -> Tensor");
  m.def(
      "block_sparse_linear_dw(Tensor dy, Tensor x, Tensor row_ptr, Tensor col, Tensor row_of, "
      "Tensor col_ptr, Tensor row_t, Tensor position_t, int rows, int cols) -> Tensor");
  m.def(
      "block_sparse_linear_backward(Tensor dy, Tensor x, Tensor values, Tensor row_ptr, Tensor "
      "col, Tensor row_of, Tensor col_ptr, Tensor row_t, Tensor position_t) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("block_sparse_linear", TORCH_BOX(&forward_cpu));
  m.impl("block_sparse_linear_dx", TORCH_BOX(&input_gradient_cpu));
  m.impl("block_sparse_linear_dw", TORCH_BOX(&weight_gradient_cpu));
  m.impl("block_sparse_linear_backward", TORCH_BOX(&backward_cpu));
}

}  // namespace secateur::block_sparse
