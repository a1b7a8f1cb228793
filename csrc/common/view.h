#pragma once
// A strided tensor as kernels see it, and walking it in logical (row-major) order. No torch here.
#include <cstdint>

#include "common/dtype.h"

namespace secateur {

constexpr int kMaxDims = 8;

// One tensor seen by its last dimension: element (i0, ..., id) of logical index
// ((i0 * size[1] + i1) * ...) lies at data + sum(i * stride); strides in elements.
struct View {
  void* data;
  Dtype dtype;
  int ndim;  // >= 1; neighbouring dimensions that are contiguous are merged
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

namespace {

// Where logical element `index` of `t` lies, in elements, and how many follow it in its last
// dimension.
struct Position {
  int64_t offset;
  int64_t remaining;
};

constexpr Position locate(const View& t, int64_t index) {
  const int last = t.ndim - 1;
  const int64_t inner = index % t.size[last];
  Position p{inner * t.stride[last], t.size[last] - inner};
  index /= t.size[last];
  for (int d = last - 1; d >= 0; --d) {
    p.offset += index % t.size[d] * t.stride[d];
    index /= t.size[d];
  }
  return p;
}

}  // namespace
}  // namespace secateur
