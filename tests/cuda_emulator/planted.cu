// Small kernels for the emulator's own tests. Each is right where `bug` is kNone and wrong in one
// way where it is not; tests/test_cuda_emulator.py says who must notice.
#include <utility>

#include "common/cuda.cuh"
#include "common/mma.cuh"

namespace {

using namespace secateur;

// In the order of Bug in tests/test_cuda_emulator.py.
enum Bug : int {
  kNone,
  kMissingBarrier,
  kReadBeyond,
  kSharedBeyond,
  kSharedPointerBeyond,
  kDivergentShuffle,
  kCrossBlockAdd,
  kPlainHistogram,
  kWriteAfterRead,
  kUninitialised,
  kSkippedBarrier,
  kOwnLaneNotNamed,
  kSourceNotNamed,
  kDifferentCollectives,
  kShift,
  kMissingFence,
  kFenceTooEarly,
  kMissingSyncwarp,
  kMisaligned,
  kOtherThreadsStack,
  kMissingWait,
  kNoBarrierAfterWait,
  kEarlyOverwrite,
  kFragmentOrder,
  kAsmOperands,
  kStaleRead,
};

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAll = 0xffffffffu;

__device__ float warp_sum(Bug bug, float x) {
  if (bug == kDivergentShuffle && threadIdx.x % 32 >= 16) return x;
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}

// The sum over a block, in thread 0.
__device__ float block_sum(Bug bug, float x) {
  SECATEUR_SHARED(float, parts, kWarps);
  const int warp = threadIdx.x / 32;
  x = warp_sum(bug, x);
  if (threadIdx.x % 32 == 0) {
    float* const pointer = parts;
    if (bug == kSharedPointerBeyond)
      pointer[warp + 1] = x;
    else
      parts[warp + (bug == kSharedBeyond)] = x;
  }
  if (bug != kMissingBarrier) __syncthreads();
  if (warp > 0) return 0;
  return warp_sum(kNone, threadIdx.x < kWarps ? parts[threadIdx.x] : 0.0f);
}

__global__ void __launch_bounds__(kThreads) sum_kernel(Bug bug, const float* x, int n, float* sum) {
  float s = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n + (bug == kReadBeyond);
       i += gridDim.x * kThreads)
    s += x[i];
  s = block_sum(bug, s);
  if (threadIdx.x > 0) return;
  if (bug == kCrossBlockAdd)
    *sum += s;
  else
    atomicAdd(sum, s);
}

// The same, always in one order: the last block adds up what all have left. It also clears what all
// of them have read, as a kernel does that leaves its workspace ready for the next launch.
__global__ void __launch_bounds__(kThreads)
    ordered_sum_kernel(Bug bug, float* x, int n, float* parts, unsigned* ticket, float* sum) {
  SECATEUR_SHARED(bool, is_last, 1);
  float s = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) s += x[i];
  s = block_sum(kNone, s);
  if (threadIdx.x == 0) {
    if (bug == kFenceTooEarly) __threadfence();
    parts[blockIdx.x] = s;
    if (bug != kMissingFence && bug != kFenceTooEarly) __threadfence();
    is_last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  s = 0;
  if (threadIdx.x < gridDim.x)
    s = bug == kStaleRead ? __ldg(&parts[threadIdx.x]) : parts[threadIdx.x];
  s = block_sum(kNone, s);
  if (threadIdx.x == 0) {
    *sum = s;
    *ticket = 0;
  }
  for (int i = threadIdx.x; i < n; i += kThreads) x[i] = 0;
}

__global__ void __launch_bounds__(kThreads)
    histogram_kernel(Bug bug, const uint8_t* x, int n, unsigned* counts) {
  SECATEUR_SHARED(unsigned, local, 256);
  const int tile = 4 * kThreads;
  for (int first = blockIdx.x * tile; first < n; first += gridDim.x * tile) {
    if (bug != kUninitialised || first > 0) local[threadIdx.x] = 0;
    __syncthreads();
    for (int i = first + threadIdx.x; i < min(first + tile, n); i += kThreads) {
      if (bug == kPlainHistogram)
        ++local[x[i]];
      else
        atomicAdd(&local[x[i]], 1u);
    }
    __syncthreads();
    const int bin = 255 - threadIdx.x;
    if (const unsigned count = local[bin]) atomicAdd(&counts[bin], count);
    if (bug != kWriteAfterRead) __syncthreads();
  }
}

// Which elements are positive, in any order.
__global__ void __launch_bounds__(kThreads)
    compact_kernel(Bug bug, const float* x, int n, int* indices, int* count) {
  SECATEUR_SHARED(int, counts, kWarps);
  SECATEUR_SHARED(int, base, 1);
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (bug == kSkippedBarrier && i - lane >= n) return;
  const bool kept = i < n && x[i] > 0;
  if (bug == kDifferentCollectives && lane == 7) __any_sync(kAll, kept);
  const uint32_t ballot = __ballot_sync(bug == kOwnLaneNotNamed ? kAll >> 1 : kAll, kept);
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int own = counts[w];
      counts[w] = total;
      total += own;
    }
    base[0] = atomicAdd(count, total);
  }
  __syncthreads();
  int first = 0;
  if (lane == 0) first = base[0] + counts[warp];
  if (bug == kSourceNotNamed && lane > 0)
    first = __shfl_sync(kAll - 1, first, 0);
  else if (bug != kSourceNotNamed)
    first = __shfl_sync(kAll, first, 0);
  const uint32_t up_to_me = bug == kShift ? (1u << (lane + 1)) - 1 : (2u << lane) - 1;
  if (kept) indices[first + __popc(ballot & up_to_me) - 1] = i;
}

// Turns every 32 elements round.
__global__ void __launch_bounds__(kThreads) reverse_kernel(Bug bug, const float* x, float* y) {
  SECATEUR_DYNAMIC_SHARED(float, shared);
  float* const own = shared + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32, first = blockIdx.x * kThreads + (threadIdx.x - lane);
  if (lane < 8) {
    const auto* const from = reinterpret_cast<const float4*>(x + first + (bug == kMisaligned));
    const float4 four = from[lane];
    *reinterpret_cast<float4*>(own + 4 * lane) = four;
  }
  if (bug != kMissingSyncwarp) __syncwarp();
  y[first + lane] = own[31 - lane];
}

// Thread 0 hands out the address of a variable of its own.
__global__ void __launch_bounds__(kThreads) share_kernel(Bug bug, int* out) {
  SECATEUR_SHARED(int*, address, 1);
  SECATEUR_SHARED(int, value, 1);
  int own = 42;
  if (threadIdx.x == 0) {
    value[0] = own;
    address[0] = bug == kOtherThreadsStack ? &own : value;
  }
  __syncthreads();
  out[threadIdx.x] = *address[0];
  __syncthreads();
}

// multiply_accumulate(), but that the text takes the two registers of `b` the wrong way round: who
// compiles the other branch cannot know.
__device__ void multiply_wrongly(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(SECATEUR_CUDA_EMULATOR)
  multiply_accumulate<BFloat16>(sum, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%9, %8}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// c = a b^T, a of m x k and b of n x k bfloat16 (k a multiple of 8): tiles of 32 x 32, each warp a
// quarter of one, fetched ahead in two stages.
constexpr int kTile = 32, kPitch = kTile + 8, kTileThreads = 128;

__global__ void __launch_bounds__(kTileThreads)
    matmul_kernel(Bug bug, const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k) {
  SECATEUR_DYNAMIC_SHARED(uint16_t, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.y * kTile, first_col = blockIdx.x * kTile;
  const auto tile = [&](int stage, int operand) {
    return shared + (stage % 2 * 2 + operand) * kTile * kPitch;
  };
  const auto fetch = [&](int stage) {
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4 * 8, depth = stage * kTile + chunk;
    for (int operand = 0; operand < 2; ++operand) {
      const uint16_t* const from = operand ? b : a;
      const int at = (operand ? first_col : first_row) + row;
      const bool inside = at < (operand ? n : m) && depth < k;
      copy_async(tile(stage, operand) + row * kPitch + chunk, inside ? from + at * k + depth : from,
                 inside ? 16 : 0);
    }
    commit_copies();
  };

  float sums[2][4] = {};
  const int stages = (k + kTile - 1) / kTile;
  fetch(0);
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages)
      fetch(stage + 1);
    else
      commit_copies();
    if (bug == kMissingWait)
      wait_for_copies<2>();
    else
      wait_for_copies<1>();
    if (bug != kNoBarrierAfterWait) __syncthreads();
    for (int depth = 0; depth < kTile; depth += 16) {
      uint32_t rows[4], cols[4];
      load_matrices<false>(
          rows, tile(stage, 0) + (warp / 2 * 16 + lane % 16) * kPitch + depth + lane / 16 * 8);
      load_matrices<false>(cols, tile(stage, 1) +
                                     (warp % 2 * 16 + lane / 16 * 8 + lane % 8) * kPitch + depth +
                                     lane / 8 % 2 * 8);
      if (bug == kFragmentOrder) std::swap(cols[1], cols[2]);
      for (int j = 0; j < 2; ++j) {
        const uint32_t col[] = {cols[2 * j], cols[2 * j + 1]};
        if (bug == kAsmOperands)
          multiply_wrongly(sums[j], rows, col);
        else
          multiply_accumulate<BFloat16>(sums[j], rows, col);
      }
    }
    if (bug != kEarlyOverwrite) __syncthreads();
  }
  for (int j = 0; j < 2; ++j)
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + warp / 2 * 16 + lane / 4 + i / 2 * 8;
      const int col = first_col + warp % 2 * 16 + j * 8 + lane % 4 * 2 + i % 2;
      if (row < m && col < n) c[row * n + col] = sums[j][i];
    }
}

// Every builtin that the others leave out; see test_builtins.
__global__ void builtins_kernel(uint64_t* out) {
  const unsigned lane = threadIdx.x % 32, low = lane % 8;
  const uint64_t results[] = {
      __shfl_up_sync(kAll, lane, 3),
      __shfl_down_sync(kAll, lane, 3),
      __shfl_xor_sync(kAll, lane, 5, 8),
      __shfl_sync(kAll, lane, 9, 8),
      __shfl_down_sync(kAll, uint64_t{lane} << 40, 1, 4),
      __ballot_sync(kAll, lane % 3 == 0),
      static_cast<uint64_t>(__any_sync(kAll, lane == 31)),
      static_cast<uint64_t>(__all_sync(kAll, lane < 31)),
      __match_any_sync(kAll, low),
      __reduce_add_sync(kAll, lane),
      __reduce_min_sync(kAll, lane + 5),
      __reduce_max_sync(kAll, lane),
      __reduce_and_sync(kAll, lane | 64),
      __reduce_or_sync(kAll, 1u << lane),
      __reduce_xor_sync(kAll, lane < 3 ? 1u << lane : 0u),
      static_cast<uint64_t>(__syncthreads_count(lane < 5)),
      static_cast<uint64_t>(__syncthreads_and(lane < 31)),
      static_cast<uint64_t>(__syncthreads_or(lane == 31)),
      static_cast<uint64_t>(__clz(1 << lane)),
      static_cast<uint64_t>(__ffs(1 << lane)),
      __brev(1u << lane),
      __umulhi(1u << 31, 2 * lane),
      __funnelshift_l(0x80000000u, 1u, 1),
      __float_as_uint(1.0f),
      blockDim.x * 1000 + gridDim.x,
  };
  constexpr int n = sizeof(results) / sizeof(results[0]);
  for (int i = 0; i < n; ++i) out[threadIdx.x * n + i] = results[i];
}

__global__ void atomics_kernel(unsigned* values) {
  atomicSub(&values[0], 1u);
  atomicMin(&values[1], threadIdx.x);
  atomicMax(&values[2], threadIdx.x);
  atomicAnd(&values[3], ~(1u << threadIdx.x));
  atomicOr(&values[4], 1u << threadIdx.x);
  atomicXor(&values[5], 1u << threadIdx.x);
  atomicInc(&values[6], 9u);
  atomicDec(&values[7], 9u);
  atomicCAS(&values[8], threadIdx.x, threadIdx.x + 1);
  atomicExch(&values[9], threadIdx.x);
}

__global__ void large_kernel(double* out) {
  SECATEUR_SHARED(double, large, 6145);
  large[threadIdx.x] = 0;
  __syncthreads();
  *out = large[0];
}

__global__ void shared_of_both_kinds_kernel(int* out) {
  SECATEUR_DYNAMIC_SHARED(int, dynamic);
  SECATEUR_SHARED(int, fixed, 2);
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 1;
  __syncthreads();  // or nvcc would keep them in registers
  out[threadIdx.x] = fixed[1 - threadIdx.x] + dynamic[1 - threadIdx.x];
}

__global__ void empty_kernel() {}

__global__ void __launch_bounds__(32) bounded_kernel() {}

}  // namespace

#if defined(SECATEUR_CUDA_EMULATOR)  // nvcc is asked for the kernels
extern "C" {

const char* sum(Bug bug, const float* x, int n, float* result, int blocks) {
  return cuda_emulator::message_of(
      [&] { SECATEUR_LAUNCH(sum_kernel, blocks, kThreads, 0, nullptr, bug, x, n, result); });
}

const char* ordered_sum(Bug bug, float* x, int n, float* parts, unsigned* ticket, float* result,
                        int blocks) {
  return cuda_emulator::message_of([&] {
    SECATEUR_LAUNCH(ordered_sum_kernel, blocks, kThreads, 0, nullptr, bug, x, n, parts, ticket,
                    result);
  });
}

const char* histogram(Bug bug, const uint8_t* x, int n, unsigned* counts, int blocks) {
  return cuda_emulator::message_of(
      [&] { SECATEUR_LAUNCH(histogram_kernel, blocks, kThreads, 0, nullptr, bug, x, n, counts); });
}

const char* compact(Bug bug, const float* x, int n, int* indices, int* count) {
  const int blocks = (n + kThreads - 1) / kThreads;
  return cuda_emulator::message_of([&] {
    SECATEUR_LAUNCH(compact_kernel, blocks, kThreads, 0, nullptr, bug, x, n, indices, count);
  });
}

const char* reverse(Bug bug, const float* x, float* y, int blocks) {
  return cuda_emulator::message_of([&] {
    SECATEUR_LAUNCH(reverse_kernel, blocks, kThreads, kThreads * sizeof(float), nullptr, bug, x, y);
  });
}

const char* share(Bug bug, int* out) {
  return cuda_emulator::message_of(
      [&] { SECATEUR_LAUNCH(share_kernel, 1, kThreads, 0, nullptr, bug, out); });
}

const char* matmul(Bug bug, const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k) {
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  const size_t shared_bytes = 4 * kTile * kPitch * sizeof(uint16_t);
  return cuda_emulator::message_of([&] {
    SECATEUR_LAUNCH(matmul_kernel, grid, kTileThreads, shared_bytes, nullptr, bug, a, b, c, m, n,
                    k);
  });
}

const char* builtins(uint64_t* out) {
  return cuda_emulator::message_of(
      [&] { SECATEUR_LAUNCH(builtins_kernel, 1, 32, 0, nullptr, out); });
}

const char* atomics(unsigned* values) {
  return cuda_emulator::message_of(
      [&] { SECATEUR_LAUNCH(atomics_kernel, 1, 32, 0, nullptr, values); });
}

const char* large(double* out) {
  return cuda_emulator::message_of([&] { SECATEUR_LAUNCH(large_kernel, 1, 1, 0, nullptr, out); });
}

const char* shared_of_both_kinds(size_t shared_bytes, bool allow, int* out) {
  return cuda_emulator::message_of([&] {
    if (allow)
      cudaFuncSetAttribute(shared_of_both_kinds_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes));
    SECATEUR_LAUNCH(shared_of_both_kinds_kernel, 1, 2, shared_bytes, nullptr, out);
  });
}

const char* empty(unsigned grid_y, unsigned threads, size_t shared_bytes, int allowed) {
  return cuda_emulator::message_of([&] {
    cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    SECATEUR_LAUNCH(empty_kernel, dim3(1, grid_y), threads, shared_bytes, nullptr);
  });
}

const char* bounded(unsigned threads) {
  return cuda_emulator::message_of(
      [&] { SECATEUR_LAUNCH(bounded_kernel, 1, threads, 0, nullptr); });
}

}  // extern "C"
#endif
