// Exact selection on CUDA. A sample gives an interval that should hold the k-th; one sweep over the
// inputs makes every score in registers, writes the mask of what lies above the interval and
// collects the few inside it; the counts prove that the k-th is among them, and narrowing ends at
// it. Bound by reading the inputs once, by 16-byte loads. If the interval missed, or holds more
// than there is room for, histograms narrow it and the sweep is made again.
// What is ordered are places, pairs of a key (a score as an integer) and an index, no two alike: a
// tie is no special case, and the result, the worst place that is kept, does not depend on the
// order in which blocks collect.
// Nothing waits for the host. What is launched is fixed; the last block of a launch to be through
// decides on the next phase, and a launch of another phase returns at once.
#include <cmath>
#include <cstring>
#include <limits>

#include "common/evaluate.cuh"
#include "topk/topk.h"

namespace secateur::topk::CUDA {
namespace {

using Counter = unsigned long long;  // what atomics take

constexpr int kByte = 8;  // elements of one byte of the mask
constexpr int kStride = kThreads * kByte;
constexpr int kWarps = kThreads / 32;
// Blocks on a multiprocessor at once: where ptxas is not told, it spills registers to have more.
constexpr int kMinBlocks = 2;
// A block that counts has up to kBins numbers to hand in: no more blocks than fill a GPU.
constexpr unsigned kMaxCountingBlocks = 1024;
constexpr int64_t kPlacesPerBlock = kThreads * 8;

// Launches that narrow with many blocks: what usual scores take. The last block of the last one
// goes on alone.
constexpr int kIntervalLaunches = 3;
constexpr int kChoiceLaunches = 4;

// Of two keys the larger is better, of equal keys the lower index.
struct Place {
  int64_t key, index;
};

__device__ bool worse(const Place& a, const Place& b) {
  return a.key < b.key || (a.key == b.key && a.index > b.index);
}

// The places from the best to the worst, both included.
struct Range {
  Place best, worst;
};

// The rank-th best, counted from 1, of the `inside` elements in a range is looked for; of none if
// there are none.
struct Target {
  Range range;
  int64_t rank, inside;
};
constexpr int kTargets = 2;

enum class Phase : int32_t { Interval, Sweep, Histogram, Choice, Fill, Done };

constexpr uint32_t kNoItem = std::numeric_limits<uint32_t>::max();

// What a launch leaves to the next.
struct State {
  Phase phase;
  uint32_t blocks_done;  // of the running launch
  uint32_t bad_item;     // the first with a score that is an error
  int64_t tolerance;     // how many sampled elements too wide an end of the interval may be
  Counter sampled;       // elements looked at, the dead included
  Counter pooled;        // elements collected, or that would have been if there were room
  Counter above, alive;  // counted by a sweep
  // Of the first, a sweep or histogram takes the range. Both together are ends of the interval.
  Target targets[kTargets];
};

// An item on the device.
struct Entry {
  const void *weight, *grad, *state;  // if they can be loaded by vectors
  const ScoreInputs* strided;         // else
  const uint8_t* alive;
  uint8_t* mask;
  Counter* counts;
  int64_t numel, first_element, first_chunk;
  ScoreParams params;
  Dtype dtype;
};

// Device memory, and how it is divided.
struct Workspace {
  State* state;
  Entry* entries;
  ScoreInputs* strided;
  Counter* bins;  // kBins for each target; zero between launches
  int64_t* indices;
  void* keys;  // with the indices: the pool, of `capacity` places
  int64_t bytes;

  Workspace(const Problem& p, int64_t capacity, void* memory) {
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    uintptr_t at = begin;
    const auto take = [&]<typename T>(T*& array, int64_t n) {
      array = reinterpret_cast<T*>(at);
      at += static_cast<uintptr_t>(n) * sizeof(T);
    };
    take(state, 1);
    take(entries, p.n_items);
    take(strided, std::count_if(p.items, p.items + p.n_items,
                                [](const Item& item) { return !in_vectors(item.inputs); }));
    take(bins, kTargets * kBins);
    take(indices, capacity);
    keys = reinterpret_cast<void*>(at);
    bytes = static_cast<int64_t>(at - begin) + capacity * (p.wide ? 8 : 4);
  }
};

// What every kernel is told.
struct Job : Workspace {
  int64_t* info;
  int64_t n_entries, n_chunks, numel, keep, capacity;
  Range all;  // places
  Formula formula;
  bool largest, finite, by_threshold;
};

// Sums of warps and blocks

// Over the lanes up to this one.
template <typename T>
__device__ T inclusive_sum(T x) {
  const int lane = threadIdx.x % 32;
  for (int delta = 1; delta < 32; delta *= 2) {
    const T before = __shfl_up_sync(kAllLanes, x, delta);
    if (lane >= delta) x += before;
  }
  return x;
}

// Over the threads before this one.
__device__ int64_t sum_before(int64_t x) {
  SECATEUR_SHARED(int64_t, sums, kWarps);
  const int warp = threadIdx.x / 32;
  const int64_t sum = inclusive_sum(x);
  if (threadIdx.x % 32 == 31) sums[warp] = sum;
  __syncthreads();
  int64_t before = sum - x;
  for (int w = 0; w < warp; ++w) before += sums[w];
  __syncthreads();
  return before;
}

__device__ void add_total(Counter* counter, uint32_t n) {
  n = __reduce_add_sync(kAllLanes, n);
  if (n && threadIdx.x % 32 == 0) atomicAdd(global(counter), n);
}

__device__ void lower_to(uint32_t* value, uint32_t x) {
  x = __reduce_min_sync(kAllLanes, x);
  if (x != kNoItem && threadIdx.x % 32 == 0) atomicMin(value, x);
}

// To be called by all blocks when they have handed in what they found: whether this is the last of
// them, which sees it all.
__device__ bool last_block(State& s) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&s.blocks_done, 1u) + 1 == gridDim.x;
    __threadfence();
    if (last) s.blocks_done = 0;
  }
  return __syncthreads_or(last);
}

// Scores of groups: eight neighbours, of one byte of the mask

template <typename T, typename F>
__device__ void for_storage(Dtype dtype, F&& f) {
  if constexpr (sizeof(T) == 8) {
    f.template operator()<double>();
  } else {
    if (dtype == Dtype::BFloat16) return f.template operator()<BFloat16>();
    if (dtype == Dtype::Half) return f.template operator()<Half>();
    f.template operator()<float>();
  }
}

// How many elements of the item the group at `index` has.
__device__ int count_at(const Entry& e, int64_t index) {
  const int64_t left = e.numel - index;
  return left >= kByte ? kByte : left > 0 ? static_cast<int>(left) : 0;
}

// Scores of N groups, kStride elements apart; zero beyond the end.
template <Mode M, typename T, int N>
__device__ void score_vectors(const Job& job, const Entry& e, int64_t index, T (&x)[N][kByte]) {
  ScoreInputs in{};
  in.weight.data = const_cast<void*>(e.weight);
  in.grad.data = const_cast<void*>(e.grad);
  in.state.data = const_cast<void*>(e.state);
  in.formula = job.formula;
  in.params = e.params;
  Operands<T, kByte> operands[N];
  for_storage<T>(e.dtype, [&]<typename S>() {
    PackedOperands<S, kByte> packed[N];
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (count_at(e, index + k * kStride) == kByte) packed[k].load(in, index + k * kStride);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int64_t first = index + k * kStride;
      const int count = count_at(e, first);
      operands[k] = count == kByte ? packed[k].widened() : load_first<S, kByte>(in, first, count);
    }
  });
#pragma unroll
  for (int k = 0; k < N; ++k) scores<M>(in, operands[k], index + k * kStride, x[k]);
}

template <Mode M, typename T, int N>
__device__ void score_elements(const Entry& e, int64_t index, T (&x)[N][kByte]) {
  const ScoreInputs& in = *global(e.strided);
#pragma unroll 1
  for (int m = 0; m < N * kByte; ++m) {
    const int64_t i = index + m / kByte * kStride + m % kByte;
    if (i >= e.numel) continue;
    Operands<T, 1> operands;
    for_storage<T>(e.dtype, [&]<typename S>() { operands = load_one<S>(in, i); });
    T one[1];
    scores<M>(in, operands, i, one);
    // Registers have no index that changes while a kernel runs.
#pragma unroll
    for (int j = 0; j < N * kByte; ++j)
      if (j == m) x[j / kByte][j % kByte] = one[0];
  }
}

template <typename T>
struct Group {
  int64_t index;    // of the first element, in the item
  uint32_t living;  // bits of the elements to choose from
  Int<T> keys[kByte];
  bool bad;  // a living element has a score that is an error
};

// N groups, kStride elements apart.
template <typename T, Mode M, int N>
__device__ void load_groups(const Job& job, const Entry& e, int64_t index, Group<T> (&groups)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    Group<T>& g = groups[k];
    g.index = index + k * kStride;
    const int count = count_at(e, g.index);
    g.living = (1u << count) - 1;
    if (e.alive && count > 0) g.living &= global(e.alive)[g.index / kByte];
  }
  T x[N][kByte] = {};
  e.strided ? score_elements<M>(e, index, x) : score_vectors<M>(job, e, index, x);
  const Int<T> limit = bits_as<Int<T>>(std::numeric_limits<T>::infinity()) - job.finite;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    Group<T>& g = groups[k];
    Int<T> largest = 0;
#pragma unroll
    for (int i = 0; i < kByte; ++i) largest = max(largest, bits_as<Int<T>>(absolute(x[k][i])));
    g.bad = false;
    if (largest > limit) {
#pragma unroll
      for (int i = 0; i < kByte; ++i)
        g.bad |= bits_as<Int<T>>(absolute(x[k][i])) > limit && (g.living >> i & 1);
    }
#pragma unroll
    for (int i = 0; i < kByte; ++i) g.keys[i] = key_of(x[k][i], job.largest);
  }
}

// Calls f(item, entry, group) in all threads alike: past the end of an item groups are empty.
template <typename T, Mode M, typename F>
__device__ void for_groups(const Job& job, F&& f) {
  // Eight doubles are four loads of every input already.
  constexpr int n = sizeof(T) == 8 ? 1 : 2;
  static_assert(kChunk % (n * kStride) == 0);
  for (int64_t chunk = blockIdx.x; chunk < job.n_chunks; chunk += gridDim.x) {
    const int item = find<&Entry::first_chunk>(job.entries, job.n_entries, chunk);
    const Entry& e = job.entries[item];
    const int64_t first = (chunk - e.first_chunk) * kChunk + threadIdx.x * kByte;
    for (int64_t at = 0; at < kChunk; at += n * kStride) {
      Group<T> groups[n];
      load_groups<T, M>(job, e, first + at, groups);
#pragma unroll
      for (int k = 0; k < n; ++k) f(item, e, groups[k]);
    }
  }
}

// What of a group lies where, one bit each.
struct Classes {
  uint32_t above, inside;
};

// By a range in device memory: keys are at hand, indices are for the few that lie inside.
template <typename T>
class Classifier {
 public:
  __device__ explicit Classifier(const Range& range)
      : range_(range),
        best_(static_cast<Int<T>>(range.best.key)),
        worst_(static_cast<Int<T>>(range.worst.key)) {}

  __device__ Classes operator()(const Entry& e, const Group<T>& g) const {
    uint32_t above = 0, below = 0;
#pragma unroll
    for (int i = 0; i < kByte; ++i) {
      above |= uint32_t{g.keys[i] > best_} << i;
      below |= uint32_t{g.keys[i] < worst_} << i;
    }
    uint32_t inside = g.living & ~above & ~below;
    if (inside) {
      const auto [best, worst] = range_;
#pragma unroll
      for (int i = 0; i < kByte; ++i) {
        const Place p{g.keys[i], e.first_element + g.index + i};
        const uint32_t bit = inside & 1u << i;
        if (worse(best, p)) above |= bit;
        if (worse(best, p) || worse(p, worst)) inside &= ~bit;
      }
    }
    return {above & g.living, inside};
  }

 private:
  const Range& range_;
  Int<T> best_, worst_;
};

// The pool

// Puts places into the pool, those of a group side by side. Called with all lanes of a warp; each
// warp has room of its own, in shared memory.
template <typename K>
class Collector {
 public:
  static constexpr int kHeld = 64;  // as many wait for more, so that few atomics are needed
  static constexpr int kRoom = kHeld + 32 * kByte;

  __device__ Collector(const Job& job, K* keys, int64_t* indices)
      : job_(job),
        keys_(keys + threadIdx.x / 32 * kRoom),
        indices_(indices + threadIdx.x / 32 * kRoom) {}

  // The elements of a group whose bits are set; `index` is the first one's among all items.
  __device__ void add(const K (&keys)[kByte], int64_t index, uint32_t bits) {
    if (!__any_sync(kAllLanes, bits != 0)) return;
    const int count = __popc(bits);
    const int sum = inclusive_sum(count);
    int at = held_ + sum - count;
#pragma unroll
    for (int i = 0; i < kByte; ++i) {
      if (bits >> i & 1) {
        keys_[at] = keys[i];
        indices_[at++] = index + i;
      }
    }
    held_ += __shfl_sync(kAllLanes, sum, 31);
    if (held_ > kHeld) flush();
  }

  __device__ void flush() {
    if (held_ == 0) return;
    const int lane = threadIdx.x % 32;
    Counter first = 0;
    if (lane == 0) first = atomicAdd(&job_.state->pooled, static_cast<Counter>(held_));
    first = __shfl_sync(kAllLanes, first, 0);
    __syncwarp();
    for (int i = lane; i < held_; i += 32) {
      const int64_t at = static_cast<int64_t>(first) + i;
      if (at >= job_.capacity) break;
      static_cast<K*>(job_.keys)[at] = keys_[i];
      job_.indices[at] = indices_[i];
    }
    __syncwarp();
    held_ = 0;
  }

 private:
  const Job& job_;
  K* const keys_;
  int64_t* const indices_;
  int held_ = 0;
};

// Narrowing

// A range as kBins parts, the last the best: of its keys or, if they are one, of its indices.
class Parts {
 public:
  __device__ explicit Parts(const Range& range) : Parts(range, range.best.key != range.worst.key) {}
  __device__ Parts(const Range& range, bool by_key)
      : by_key_(by_key), origin_(by_key ? range.worst.key : range.worst.index) {
    static_assert(kBins == 1 << 11);
    const int bits = 64 - __clzll(static_cast<long long>(value(range.best)));
    shift_ = bits > 11 ? bits - 11 : 0;
  }

  // Of a place in the range.
  __device__ int part_of(const Place& p) const { return static_cast<int>(value(p) >> shift_); }

  // Of the same range; `last` is the last index there is.
  __device__ Range part(const Range& range, int i, int64_t last) const {
    const auto& [best, worst] = range;
    const uint64_t low = static_cast<uint64_t>(i) << shift_;
    const uint64_t full = low + (uint64_t{1} << shift_) - 1, top = value(best);
    const uint64_t high = full < top ? full : top;
    const auto origin = static_cast<uint64_t>(origin_);
    if (by_key_)
      return {{static_cast<int64_t>(origin + high), high == top ? best.index : 0},
              {static_cast<int64_t>(origin + low), low == 0 ? worst.index : last}};
    return {{best.key, static_cast<int64_t>(origin - high)},
            {best.key, static_cast<int64_t>(origin - low)}};
  }

 private:
  // Larger is better. The difference of two keys may need all 64 bits.
  __device__ uint64_t value(const Place& p) const {
    const auto origin = static_cast<uint64_t>(origin_);
    return by_key_ ? static_cast<uint64_t>(p.key) - origin
                   : origin - static_cast<uint64_t>(p.index);
  }

  bool by_key_;
  int64_t origin_;
  int shift_;
};

// Counts the parts that a thread meets; as neighbours are often alike, not one by one.
class Tally {
 public:
  __device__ explicit Tally(uint32_t* bins) : bins_(bins) {}

  __device__ void add(int part) {
    if (part != part_) flush();
    part_ = part;
    ++count_;
  }

  __device__ void flush() {
    if (count_) atomicAdd(bins_ + part_, count_);
    count_ = 0;
  }

 private:
  uint32_t* const bins_;
  int part_ = 0;
  uint32_t count_ = 0;
};

template <typename Count>
__device__ void clear(Count* bins, int n) {
  for (int i = threadIdx.x; i < n; i += kThreads) bins[i] = 0;
  __syncthreads();
}

// Adds what a block has counted to what others have.
__device__ void hand_in(const uint32_t* bins, int n, Counter* to) {
  for (int i = threadIdx.x; i < n; i += kThreads)
    if (bins[i]) atomicAdd(to + i, bins[i]);
}

// The part of the target's range that has the rank-th becomes its range. Called by all threads of a
// block.
template <typename Count>
__device__ void narrow(Target& target, const Count* bins, int64_t last) {
  constexpr int each = kBins / kThreads;
  const Target t = target;
  const int top = kBins - 1 - threadIdx.x * each;
  int64_t own = 0;
  for (int i = 0; i < each; ++i) own += static_cast<int64_t>(bins[top - i]);
  int64_t rank = t.rank - sum_before(own);
  if (rank > 0 && rank <= own) {  // in one thread
    int part = top;
    for (; rank > static_cast<int64_t>(bins[part]); --part) rank -= bins[part];
    target = {Parts(t.range).part(t.range, part, last), rank, static_cast<int64_t>(bins[part])};
  }
  __syncthreads();
}

// Whether a target need not be narrowed.
__device__ bool reached(const State& s, const Target& t) {
  return s.phase == Phase::Choice ? t.inside == t.rank : t.inside <= s.tolerance;
}

__device__ bool all_reached(const State& s) {
  return reached(s, s.targets[0]) && reached(s, s.targets[1]);
}

template <typename Count>
__device__ void narrow_all(const Job& job, const Count* bins) {
  State& s = *job.state;
#pragma unroll
  for (int t = 0; t < kTargets; ++t)
    if (!reached(s, s.targets[t])) narrow(s.targets[t], bins + t * kBins, job.all.worst.index);
}

// Counts the places of the pool in the parts of both targets, this block being one of `blocks`.
template <typename K>
__device__ void count_pool(const Job& job, uint32_t* bins, int64_t block, int64_t blocks) {
  const State& s = *job.state;
  clear(bins, kTargets * kBins);
#pragma unroll
  for (int t = 0; t < kTargets; ++t) {
    if (reached(s, s.targets[t])) continue;
    const Range range = s.targets[t].range;
    const Parts parts(range);
    Tally tally(bins + t * kBins);
    const int64_t n = static_cast<int64_t>(s.pooled);
    for (int64_t i = block * kThreads + threadIdx.x; i < n; i += blocks * kThreads) {
      const Place p{static_cast<const K*>(job.keys)[i], job.indices[i]};
      if (!worse(range.best, p) && !worse(p, range.worst)) tally.add(parts.part_of(p));
    }
    tally.flush();
  }
  __syncthreads();
}

// Decisions: what one thread does when a launch is through

__device__ void begin_sweep(State& s, const Range& range) {
  s.phase = Phase::Sweep;
  s.targets[0].range = range;
  s.pooled = s.above = s.alive = 0;
}

// Looks for the rank-th best of the `inside` elements in a range.
__device__ void look_into(const Job& job, const Range& range, int64_t rank, int64_t inside) {
  State& s = *job.state;
  s.targets[0] = {range, rank, inside};
  if (inside <= job.capacity)
    begin_sweep(s, range);
  else
    s.phase = Phase::Histogram;
}

// Which ranks in the sample the ends of the interval have.
__device__ void after_sample(const Job& job) {
  State& s = *job.state;
  const auto pooled = static_cast<int64_t>(s.pooled);
  const auto n = static_cast<double>(s.sampled), numel = static_cast<double>(job.numel);
  const double share = static_cast<double>(job.keep) / numel;  // the dead are in n as well
  // Four standard deviations of the k-th's rank, unless that would be more than there is room for.
  const double room = 0.4 * static_cast<double>(job.capacity) * n / numel;
  const auto margin = static_cast<int64_t>(fmin(4 * sqrt(n * share * (1 - share)), room)) + 1;
  // An element may be in the sample twice: no part of a range is sure to hold less.
  s.tolerance = 2 + margin / 8;
  const auto rank = static_cast<int64_t>(n * share);
  const int64_t ends[kTargets] = {rank - margin, rank + margin};
#pragma unroll
  for (int t = 0; t < kTargets; ++t) {
    const bool there = 0 < ends[t] && ends[t] <= pooled;  // else all that is better, or worse
    s.targets[t] = {job.all, there ? ends[t] : 0, there ? pooled : 0};
  }
}

__device__ void after_narrowing(State& s) {
  if (s.phase == Phase::Choice)
    s.phase = Phase::Fill;
  else
    begin_sweep(s, {s.targets[0].range.best, s.targets[1].range.worst});
}

__device__ void tell(const Job& job, bool bad) {
  const State& s = *job.state;
  job.info[0] = bad ? static_cast<int64_t>(s.bad_item) : -1;
  job.info[1] = static_cast<int64_t>(s.alive);
}

__device__ void after_sweep(const Job& job) {
  State& s = *job.state;
  const auto above = static_cast<int64_t>(s.above), inside = static_cast<int64_t>(s.pooled);
  const auto alive = static_cast<int64_t>(s.alive);
  const bool possible = job.by_threshold || job.keep <= alive;
  const bool bad = possible && s.bad_item != kNoItem;
  tell(job, bad);
  const auto [best, worst] = s.targets[0].range;
  if (bad || !possible || job.by_threshold || above == job.keep) {
    s.phase = Phase::Done;
  } else if (above > job.keep) {  // the k-th lies higher
    look_into(job, {job.all.best, {best.key, best.index - 1}}, job.keep, above);
  } else if (above + inside < job.keep) {  // it lies lower
    const int64_t known = above + inside;
    look_into(job, {{worst.key, worst.index + 1}, job.all.worst}, job.keep - known, alive - known);
  } else if (inside > job.capacity) {
    look_into(job, {best, worst}, job.keep - above, inside);
  } else {
    s.targets[0] = {{best, worst}, job.keep - above, inside};
    s.targets[1] = {};
    s.phase = Phase::Choice;
  }
}

// Kernels

// A kernel has 4 KB of parameters.
struct Piece {
  static constexpr int kWords = 4096 / sizeof(uint64_t) - 2;
  uint64_t words[kWords];
};

__global__ void __launch_bounds__(kThreads)
    upload_kernel(const __grid_constant__ Piece piece, int32_t count, uint64_t* to) {
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = piece.words[i];
}

// Collects one group of each of `parts` equal parts of the elements.
template <typename T, Mode M>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sample_kernel(const __grid_constant__ Job job, int64_t parts) {
  State& s = *job.state;
  SECATEUR_SHARED(Int<T>, keys, kWarps * Collector<Int<T>>::kRoom);
  SECATEUR_SHARED(int64_t, indices, kWarps* Collector<Int<T>>::kRoom);
  Collector<Int<T>> collector(job, keys, indices);
  uint32_t sampled = 0;
  for (int64_t first = int64_t{blockIdx.x} * kThreads; first < parts;
       first += int64_t{gridDim.x} * kThreads) {
    const int64_t i = first + threadIdx.x;
    Group<T> group[1] = {};
    int64_t index = 0;
    if (i < parts) {
      // Anywhere in the part: a fixed stride could follow a row's length.
      const int64_t begin = i * job.numel / parts, end = (i + 1) * job.numel / parts;
      const auto draw = static_cast<int64_t>(mix(static_cast<uint32_t>(i)));
      const int64_t element = begin + draw % (end - begin);
      const Entry& e =
          job.entries[find<&Entry::first_element>(job.entries, job.n_entries, element)];
      index = (element - e.first_element) / kByte * kByte;
      load_groups<T, M>(job, e, index, group);
      sampled += count_at(e, index);
      index += e.first_element;
    }
    collector.add(group[0].keys, index, group[0].living);
  }
  collector.flush();
  add_total(&s.sampled, sampled);
  if (last_block(s) && threadIdx.x == 0) after_sample(job);
}

template <typename K>
__global__ void __launch_bounds__(kThreads)
    narrow_kernel(const __grid_constant__ Job job, Phase phase, bool to_the_end) {
  State& s = *job.state;
  if (s.phase != phase) return;
  SECATEUR_SHARED(uint32_t, bins, kTargets* kBins);
  count_pool<K>(job, bins, blockIdx.x, gridDim.x);
  hand_in(bins, kTargets * kBins, job.bins);
  if (!last_block(s)) return;
  narrow_all(job, job.bins);
  clear(job.bins, kTargets * kBins);
  while (to_the_end && !all_reached(s)) {
    count_pool<K>(job, bins, 0, 1);
    narrow_all(job, bins);
  }
  if (__syncthreads_and(all_reached(s)) && threadIdx.x == 0) after_narrowing(s);
}

template <typename T, Mode M>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sweep_kernel(const __grid_constant__ Job job) {
  State& s = *job.state;
  if (s.phase != Phase::Sweep) return;
  SECATEUR_SHARED(Int<T>, keys, kWarps * Collector<Int<T>>::kRoom);
  SECATEUR_SHARED(int64_t, indices, kWarps* Collector<Int<T>>::kRoom);
  Collector<Int<T>> collector(job, keys, indices);
  const Classifier<T> classify(s.targets[0].range);
  uint32_t n_above = 0, n_alive = 0, bad_item = kNoItem;
  for_groups<T, M>(job, [&](int item, const Entry& e, const Group<T>& g) {
    const auto [above, inside] = classify(e, g);
    if (g.index < e.numel) global(e.mask)[g.index / kByte] = static_cast<uint8_t>(above);
    n_above += __popc(above);
    n_alive += __popc(g.living);
    if (g.bad) bad_item = min(bad_item, static_cast<uint32_t>(item));
    collector.add(g.keys, e.first_element + g.index, inside);
  });
  collector.flush();
  add_total(&s.above, n_above);
  add_total(&s.alive, n_alive);
  lower_to(&s.bad_item, bad_item);
  if (last_block(s) && threadIdx.x == 0) after_sweep(job);
}

// Counts the elements in the parts of the first target's range. That ends there, or (narrowing)
// leads to the next.
template <typename T, Mode M>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    histogram_kernel(const __grid_constant__ Job job, bool narrowing) {
  State& s = *job.state;
  if (s.phase != Phase::Histogram) return;
  SECATEUR_SHARED(uint32_t, bins, kBins);
  clear(bins, kBins);
  const Range& range = s.targets[0].range;
  const Classifier<T> classify(range);
  const Parts parts = narrowing ? Parts(range) : Parts(range, true);
  Tally tally(bins);
  Counter* counts = nullptr;  // of the item that the next two are about
  uint32_t n_above = 0, n_inside = 0, n_alive = 0, bad_item = kNoItem;
  const auto add_counts = [&] {
    if (!counts) return;
    add_total(counts, n_above);
    add_total(counts + 1, n_inside);
    n_above = n_inside = 0;
  };
  for_groups<T, M>(job, [&](int item, const Entry& e, const Group<T>& g) {
    if (e.counts != counts) add_counts();
    counts = e.counts;
    const auto [above, inside] = classify(e, g);
    n_above += __popc(above);
    n_inside += __popc(inside);
    n_alive += __popc(g.living);
    if (g.bad) bad_item = min(bad_item, static_cast<uint32_t>(item));
#pragma unroll
    for (int i = 0; i < kByte; ++i)
      if (inside >> i & 1) tally.add(parts.part_of({g.keys[i], e.first_element + g.index + i}));
  });
  tally.flush();
  add_counts();
  add_total(&s.alive, n_alive);
  lower_to(&s.bad_item, bad_item);
  __syncthreads();
  hand_in(bins, kBins, job.bins);
  if (!last_block(s)) return;
  if (narrowing) {
    narrow(s.targets[0], job.bins, job.all.worst.index);
    clear(job.bins, kBins);
  }
  if (threadIdx.x != 0) return;
  const auto [within, rank, inside] = s.targets[0];
  narrowing ? look_into(job, within, rank, inside) : tell(job, s.bad_item != kNoItem);
}

// Sets the bits of those in the pool that are kept.
template <typename K>
__global__ void __launch_bounds__(kThreads) fill_kernel(const __grid_constant__ Job job) {
  const State& s = *job.state;
  if (s.phase != Phase::Fill) return;
  const Place worst = s.targets[0].range.worst;
  const auto n = static_cast<int64_t>(s.pooled);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t index = job.indices[i];
    const Entry& e = job.entries[find<&Entry::first_element>(job.entries, job.n_entries, index)];
    const int64_t byte = (index - e.first_element) / kByte;
    const int64_t first = e.first_element + byte * kByte;
    const int64_t end = first + count_at(e, byte * kByte);
    // Those of one byte are neighbours in the pool: the thread that has the first sets them all.
    const int64_t before = i > 0 ? job.indices[i - 1] : -1;
    if (first <= before && before < index) continue;
    uint32_t kept = 0;
    for (int64_t j = i; j < n; ++j) {
      const Place p{static_cast<const K*>(job.keys)[j], job.indices[j]};
      if (p.index < index || p.index >= end) break;
      kept |= uint32_t{!worse(p, worst)} << (p.index - first);
    }
    global(e.mask)[byte] |= static_cast<uint8_t>(kept);
  }
}

// The host's part

// Writes to device memory, through the parameters of kernels: what they say is part of a graph.
class Upload {
 public:
  Upload(void* to, void* stream) : to_(static_cast<uint64_t*>(to)), stream_(stream) {}

  template <typename T>
  void add(const T& x) {
    static_assert(sizeof(T) % sizeof(uint64_t) == 0);
    const char* const bytes = reinterpret_cast<const char*>(&x);
    for (size_t i = 0; i < sizeof(T); i += sizeof(uint64_t)) {
      if (count_ == Piece::kWords) launch();
      std::memcpy(piece_.words + count_++, bytes + i, sizeof(uint64_t));
    }
  }

  void launch() {
    SECATEUR_LAUNCH(upload_kernel, 1, kThreads, 0, stream_, piece_, count_, to_);
    to_ += count_;
    count_ = 0;
  }

 private:
  Piece piece_;
  int32_t count_ = 0;
  uint64_t* to_;
  void* stream_;
};

// Puts what kernels read into device memory.
void upload(const Problem& p, const Workspace& w, const State& state, void* stream) {
  Upload upload(w.state, stream);
  upload.add(state);
  const ScoreInputs* strided = w.strided;
  for (int64_t i = 0; i < p.n_items; ++i) {
    const Item& item = p.items[i];
    const auto& [weight, grad, score, formula, params] = item.inputs;
    upload.add(Entry{weight.data, grad.data, score.data,
                     in_vectors(item.inputs) ? nullptr : strided++, item.alive, item.mask,
                     reinterpret_cast<Counter*>(item.counts), item.numel, item.first_element,
                     item.first_chunk, params, input_dtype(item.inputs, p.wide)});
  }
  for (int64_t i = 0; i < p.n_items; ++i)
    if (!in_vectors(p.items[i].inputs)) upload.add(p.items[i].inputs);
  upload.launch();
}

template <typename K>
Range all_places(int64_t numel) {
  return {{std::numeric_limits<K>::max(), 0}, {std::numeric_limits<K>::min(), numel - 1}};
}

Job job_of(const Problem& p, const Workspace& w, int64_t capacity, const Range& all,
           int64_t* info) {
  return {w,          info,     p.n_items,
          p.n_chunks, p.numel,  p.keep,
          capacity,   all,      p.items[0].inputs.formula,
          p.largest,  p.finite, p.by_threshold};
}

// Calls f.template operator()<T, M>() for the type of scores and the mode.
template <typename F>
void for_scores(const Problem& p, F&& f) {
  const auto with = [&]<typename T>() {
    p.mode == Mode::State ? f.template operator()<T, Mode::State>()
                          : f.template operator()<T, Mode::Observe>();
  };
  p.wide ? with.template operator()<double>() : with.template operator()<float>();
}

// How many histograms are sure to leave no more elements than there is room for: a key has parts of
// 11 bits; then indices are in halves, at worst, of parts.
int histograms(const Problem& p, int64_t capacity) {
  int n = p.wide ? 6 : 3;
  for (int64_t left = p.numel; left > capacity; left = ceil_div(left, kBins / 2)) ++n;
  return n;
}

template <typename T, Mode M>
void select_typed(const Problem& p, int64_t capacity, const Workspace& w, int64_t* info,
                  void* stream) {
  using K = Int<T>;
  const Range all = all_places<K>(p.numel);
  const bool narrows = !p.by_threshold && 0 < p.keep && p.keep <= p.numel;
  const bool samples = narrows && p.numel > capacity;

  State state{};
  state.phase = samples ? Phase::Interval : Phase::Sweep;
  state.bad_item = kNoItem;
  if (p.by_threshold) {  // the threshold's key is above, and there is nothing in between
    const int64_t key = key_of(static_cast<T>(p.threshold), p.largest);
    state.targets[0].range = {{key - 1, 0}, {key, 0}};
  } else {
    state.targets[0].range = narrows ? all : Range{all.best, all.best};
  }
  upload(p, w, state, stream);
  cudaMemsetAsync(w.bins, 0, kTargets * kBins * sizeof(Counter), static_cast<cudaStream_t>(stream));

  const Job job = job_of(p, w, capacity, all, info);
  const unsigned sweepers = blocks_for(std::max<int64_t>(p.n_chunks, 1));
  const unsigned counters = std::min(sweepers, kMaxCountingBlocks);
  const unsigned poolers = blocks_for(ceil_div(capacity, kPlacesPerBlock));
  const auto narrow = [&](Phase phase, int launches) {
    for (int i = 1; i <= launches; ++i)
      SECATEUR_LAUNCH(narrow_kernel<K>, poolers, kThreads, 0, stream, job, phase, i == launches);
  };
  if (samples) {
    const int64_t parts = std::min(capacity, p.numel / 4) / kByte;
    SECATEUR_LAUNCH((sample_kernel<T, M>), blocks_for(ceil_div(parts, kThreads)), kThreads, 0,
                    stream, job, parts);
    narrow(Phase::Interval, kIntervalLaunches);
  }
  SECATEUR_LAUNCH((sweep_kernel<T, M>), sweepers, kThreads, 0, stream, job);
  if (samples) {
    for (int i = histograms(p, capacity); i > 0; --i)
      SECATEUR_LAUNCH((histogram_kernel<T, M>), counters, kThreads, 0, stream, job, true);
    SECATEUR_LAUNCH((sweep_kernel<T, M>), sweepers, kThreads, 0, stream, job);
  }
  if (narrows) {
    narrow(Phase::Choice, kChoiceLaunches);
    SECATEUR_LAUNCH(fill_kernel<K>, poolers, kThreads, 0, stream, job);
  }
}

template <typename T, Mode M>
void histogram_typed(const Problem& p, int64_t low, int64_t high, const Workspace& w, int64_t* bins,
                     int64_t* info, void* stream) {
  const Range all = all_places<Int<T>>(p.numel);
  const auto clip = [&](int64_t key) { return std::clamp(key, all.worst.key, all.best.key); };

  State state{};
  state.phase = Phase::Histogram;
  state.bad_item = kNoItem;
  state.targets[0].range = {{clip(high), all.best.index}, {clip(low), all.worst.index}};
  upload(p, w, state, stream);

  Job job = job_of(p, w, 0, all, info);
  job.bins = reinterpret_cast<Counter*>(bins);
  const auto blocks = std::clamp<int64_t>(p.n_chunks, 1, kMaxCountingBlocks);
  SECATEUR_LAUNCH((histogram_kernel<T, M>), static_cast<unsigned>(blocks), kThreads, 0, stream, job,
                  false);
}

}  // namespace

// The interval is four standard deviations of a sample of as many elements, on either side, and a
// little: c elements of n are enough where c^3 = (5 n)^2.
int64_t capacity(int64_t numel) {
  const double n = static_cast<double>(numel);
  return std::min(numel, kChunk + static_cast<int64_t>(std::cbrt(25 * n * n)));
}

int64_t workspace_bytes(const Problem& problem, int64_t capacity) {
  return Workspace(problem, capacity, nullptr).bytes;
}

int select(const Problem& problem, int64_t capacity, void* workspace, int64_t* info, void* stream) {
  const Workspace w(problem, capacity, workspace);
  for_scores(problem,
             [&]<typename T, Mode M>() { select_typed<T, M>(problem, capacity, w, info, stream); });
  return cudaGetLastError();
}

int histogram(const Problem& problem, int64_t low, int64_t high, void* workspace, int64_t* bins,
              int64_t* info, void* stream) {
  const Workspace w(problem, 0, workspace);
  for_scores(problem, [&]<typename T, Mode M>() {
    histogram_typed<T, M>(problem, low, high, w, bins, info, stream);
  });
  return cudaGetLastError();
}

}  // namespace secateur::topk::CUDA
