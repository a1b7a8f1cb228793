#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "block_sparse/block_sparse.h"
#include "block_sparse/checks.h"
#include "common/torch.h"

namespace secateur::block_sparse {
namespace {

// The batch is multiplied in two halves at a time, each in parts; a small one is a single half. A
// part is small enough for what is packed of it to be still in a cache when it is used. A half
// packs for itself and is worked on by as few threads as can be: memory that one core has packed
// and another one has read takes the first one far longer to write to again.
constexpr int64_t kRowsAtOnce = 128;
constexpr int64_t kMaxHalves = 2;  // each has values and sums of its own

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
  return first.dy != Layout::InPlace && first.dy == second.dy && first.panel == second.panel &&
         first.pairs == second.pairs;
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
  const int64_t itemsize = calls[0].out.element_size(), batch = calls[0].problem.batch;
  const int64_t halves = std::clamp<int64_t>(batch / kBatchLanes, 1, kMaxHalves);
  const int64_t steps = std::max<int64_t>(1, batch / (halves * kRowsAtOnce));
  const int64_t threads = torch::stable::get_num_threads();
  const bool copy_values = threads > 1;
  int64_t panel = 1;  // rows
  std::vector<Args> wholes;
  for (Call& call : calls) {
    prefer_huge_pages(call.out.mutable_data_ptr(), call.out.numel() * call.out.element_size());
    Args& whole = wholes.emplace_back();
    static_cast<Problem&>(whole) = call.problem;
    whole.rows_of_all = batch;
    panel = std::max(panel, SECATEUR_FOR_ISA(make_plan)(whole).panel);
  }
  const int64_t panels = ceil_div(batch, panel);
  std::vector<Halves> all;
  std::vector<bool> shared;
  for (Args& whole : wholes) {
    Args largest = whole;
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
  const auto [dx, dw] = backward(dy, x, values, pattern);
  if (values.size(1) == 1 && values.size(2) == 1 && dx.out.numel() > 0 && dw.out.numel() > 0) {
    Call both = dx;
    both.problem.product = Product::Backward;
    both.problem.x = dw.problem.x;
    both.problem.x_stride = dw.problem.x_stride;
    both.problem.dw = dw.problem.dw;
    launch({both});
  } else {
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
