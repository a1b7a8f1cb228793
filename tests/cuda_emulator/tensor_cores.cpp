#include "tensor_cores.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <utility>
#include <vector>

#include "checker.h"
#include "collectives.h"
#include "launch.h"

namespace cuda_emulator {
namespace {

struct Copy {
  void* to;
  const void* from;
  size_t bytes, source_bytes;
};

struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
std::vector<Copies> copies(kMaxThreads);  // by thread of the block
Arrival arrival = Arrival::Late;
Accumulation accumulation = Accumulation::Exact;
uint64_t products = 0;

void move(const Copy& copy) {
  auto* const to = static_cast<char*>(copy.to);
  std::memcpy(to, copy.from, copy.source_bytes);
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

float widen(Format format, uint32_t pair, int half) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * half);
  if (format == Format::BFloat16) return std::bit_cast<float>(uint32_t{bits} << 16);
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

// PTX ISA, matrix fragments of mma.m16n8k16: lane 4 g + t holds, of A, rows g and g + 8 at columns
// 2 t, 2 t + 1 and those plus 8; of B the same rows of column g; of C and D rows g and g + 8 at
// columns 2 t and 2 t + 1.
constexpr int kRows = 16, kCols = 8, kDepth = 16;

struct Fragments {
  Format format;
  const uint32_t *a, *b;
  const float* c;
  float* d;
};

// What tensor cores do to a sum of 8 products and an accumulator, after Fasi, Higham, Mikaitis,
// Pranesh (2021) for the A100: all are shifted to the largest exponent, with one bit more than a
// float has, and what falls off is lost; so is what the sum has beyond a float.
float truncating_sum(const float* a, const float* b, float c) {
  constexpr int n = 8;
  double terms[n + 1];
  int exponent = std::numeric_limits<int>::min();
  double sum = 0;
  for (int i = 0; i <= n; ++i) {
    terms[i] = i < n ? static_cast<double>(a[i]) * static_cast<double>(b[i]) : c;
    sum += terms[i];
    if (terms[i] != 0 && std::isfinite(terms[i]))
      exponent = std::max(exponent, std::ilogb(terms[i]));
  }
  if (!std::isfinite(sum) || exponent == std::numeric_limits<int>::min())
    return static_cast<float>(sum);
  const double unit = std::ldexp(1.0, exponent - 24);
  sum = 0;
  for (const double term : terms) sum += std::trunc(term / unit) * unit;
  const auto rounded = static_cast<float>(sum);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(sum) ? std::nextafter(rounded, 0.0f)
                                                                  : rounded;
}

float dot(const float* a, const float* b, float c) {
  switch (accumulation) {
    case Accumulation::Sequential:
      for (int k = 0; k < kDepth; ++k) c = std::fma(a[k], b[k], c);
      return c;
    case Accumulation::Truncating:
      for (int k = 0; k < kDepth; k += 8) c = truncating_sum(a + k, b + k, c);
      return c;
    case Accumulation::Exact:
      break;
  }
  double sum = c;
  for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  return static_cast<float>(sum);
}

void exchange_fragments(WarpCall* const* calls, uint32_t mask) {
  if (mask != kFullMask) fail("mma.sync.aligned in a warp of fewer than 32 threads");
  ++products;
  float a[kRows][kDepth], b[kCols][kDepth], d[kRows][kCols];
  const auto of = [&](int lane) -> const Fragments& {
    return *static_cast<const Fragments*>(calls[lane]->data);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = of(lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i)
      a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = widen(f.format, f.a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i)
      b[g][2 * t + i % 2 + i / 2 * 8] = widen(f.format, f.b[i / 2], i % 2);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      d[row][col] = dot(a[row], b[col], of(lane).c[i]);
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) of(lane).d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

struct Rows {
  const void* row;
  uint32_t* registers;
  int count;
  bool transposed;
};

void exchange_rows(WarpCall* const* calls, uint32_t mask) {
  if (mask != kFullMask) fail("ldmatrix.sync.aligned in a warp of fewer than 32 threads");
  const auto of = [&](int lane) -> const Rows& {
    return *static_cast<const Rows*>(calls[lane]->data);
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < of(lane).count; ++matrix) {
      const auto element = [&](int row, int col) -> uint32_t {
        uint16_t bits;
        std::memcpy(&bits, static_cast<const char*>(of(8 * matrix + row).row) + 2 * col, 2);
        return bits;
      };
      const int g = lane / 4, t = lane % 4 * 2;
      of(lane).registers[matrix] = of(lane).transposed ? element(t, g) | element(t + 1, g) << 16
                                                       : element(g, t) | element(g, t + 1) << 16;
    }
}

}  // namespace

void set_arrival(Arrival when) { arrival = when; }
void set_accumulation(Accumulation how) { accumulation = how; }
uint64_t matrix_products() { return products; }
void forget_copies() {
  for (Copies& c : copies) {
    c.open.clear();
    c.groups.clear();
  }
}

void copy_async(void* shared, const void* global, int bytes, int source_bytes, Site site) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("cp.async at %s:%d: expected 4, 8 or 16 bytes, got %d", site.file, site.line, bytes);
  if (source_bytes < 0 || source_bytes > bytes)
    fail("cp.async at %s:%d: expected 0 to %d source bytes, got %d", site.file, site.line, bytes,
         source_bytes);
  const auto aligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
  };
  if (!aligned(shared) || !aligned(global))
    fail("cp.async at %s:%d: expected addresses that are multiples of %d, got %p and %p", site.file,
         site.line, bytes, shared, global);
  const Copy copy{shared, global, static_cast<size_t>(bytes), static_cast<size_t>(source_bytes)};
  const void* const pc = __builtin_return_address(0);
  if (source_bytes) checker::access(global, copy.source_bytes, checker::Access::Read, pc);
  checker::begin_copy(shared, copy.bytes, pc);
  if (arrival == Arrival::Eager) move(copy);
  copies[current_thread()].open.push_back(copy);
}

void commit_copies() {
  Copies& own = copies[current_thread()];
  own.groups.push_back(std::exchange(own.open, {}));
}

void wait_for_copies(int pending) {
  Copies& own = copies[current_thread()];
  while (own.groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : own.groups.front()) {
      if (arrival == Arrival::Late) move(copy);
      checker::end_copy(copy.to, copy.bytes, __builtin_return_address(0));
    }
    own.groups.pop_front();
  }
}

void multiply_accumulate(Format format, float (&d)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[2], const float (&c)[4], Site site) {
  Fragments data{format, a, b, c, d};
  WarpCall call{format == Format::Half ? "mma.f16" : "mma.bf16", kFullMask, exchange_fragments,
                &data, site};
  wait_for_warp(call);
}

void load_matrices(uint32_t* registers, int count, const void* row, bool transposed, Site site) {
  if (static_cast<int>(lane()) < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
      fail("ldmatrix at %s:%d: expected an address that is a multiple of 16, got %p", site.file,
           site.line, row);
    checker::access(row, 16, checker::Access::Read, __builtin_return_address(0));
  }
  Rows data{row, registers, count, transposed};
  const char* const name = count == 4 ? "ldmatrix.x4" : count == 2 ? "ldmatrix.x2" : "ldmatrix.x1";
  WarpCall call{name, kFullMask, exchange_rows, &data, site};
  wait_for_warp(call);
}

}  // namespace cuda_emulator
