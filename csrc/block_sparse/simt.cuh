#pragma once
// Products that tensor cores don't take, which is any.
#include "block_sparse/dsd.cuh"
#include "block_sparse/sdd.cuh"

namespace secateur::block_sparse::CUDA::simt {
namespace {

// Calls f.template operator()<kGroup, kRows>() with what dsd_kernel takes at a time: features of a
// line, as many as go well into its width, and rows of the batch.
template <typename T, typename F>
auto for_tile(const Problem& p, F&& f) {
  constexpr int kMost = sizeof(T) == 8 ? 2 : 4;
  const int64_t width = p.product == Product::InputGradient ? p.cols : p.rows;
  const auto with_rows = [&]<int kGroup, int kRows>() {
    return p.batch <= 32 ? f.template operator()<kGroup, 1>()
                         : f.template operator()<kGroup, kRows>();
  };
  if (width == 1) return with_rows.template operator()<1, 2>();
  if (width <= 4) return with_rows.template operator()<4, 2>();
  return with_rows.template operator()<8, kMost>();
}

inline int64_t workspace_bytes(const Problem& p) {
  return for_dtype(p.dtype, [&]<typename T>() {
    if (p.product == Product::WeightGradient) return sdd_bytes<T>(p);
    return for_tile<T>(p, [&]<int kGroup, int kRows>() { return dsd_bytes<T, kGroup, kRows>(p); });
  });
}

inline int run(const Problem& p, void* workspace, void* stream) {
  return for_dtype(p.dtype, [&]<typename T>() {
    if (p.product == Product::WeightGradient) return run_sdd<T>(p, workspace, stream);
    return for_tile<T>(p, [&]<int kGroup, int kRows>() {
      return run_dsd<T, kGroup, kRows>(p, workspace, stream);
    });
  });
}

}  // namespace
}  // namespace secateur::block_sparse::CUDA::simt
