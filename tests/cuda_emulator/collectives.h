#pragma once
// Barriers of a block and collectives of a warp, as strict as the programming guide: whoever is
// named in a mask must come, and nobody else may.
#include <cstring>

#include "emulator.h"

inline void __syncthreads(cuda_emulator::Site site = cuda_emulator::here()) {
  cuda_emulator::wait_for_block(cuda_emulator::Barrier::Plain, "__syncthreads", 0, site);
}
inline int __syncthreads_count(int predicate, cuda_emulator::Site site = cuda_emulator::here()) {
  using namespace cuda_emulator;
  return wait_for_block(Barrier::Count, "__syncthreads_count", predicate, site);
}
inline int __syncthreads_and(int predicate, cuda_emulator::Site site = cuda_emulator::here()) {
  using namespace cuda_emulator;
  return wait_for_block(Barrier::And, "__syncthreads_and", predicate, site);
}
inline int __syncthreads_or(int predicate, cuda_emulator::Site site = cuda_emulator::here()) {
  using namespace cuda_emulator;
  return wait_for_block(Barrier::Or, "__syncthreads_or", predicate, site);
}

namespace cuda_emulator {

constexpr uint32_t kFullMask = 0xffffffffu;

// `source` is the lane to read from; kOwn leaves a lane with its own value.
constexpr int kOwn = -1;
uint64_t shuffle(const char* name, uint32_t mask, uint64_t bits, int source, Site site);

void sync_warp(uint32_t mask, Site site);

enum class Vote { Ballot, Any, All, MatchAny, Add, Min, Max, And, Or, Xor };
uint64_t vote(Vote kind, const char* name, uint32_t mask, uint64_t value, Site site);

template <typename T>
T shuffle_value(const char* name, uint32_t mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(name, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulator

inline void __syncwarp(uint32_t mask = cuda_emulator::kFullMask,
                       cuda_emulator::Site site = cuda_emulator::here()) {
  cuda_emulator::sync_warp(mask, site);
}

// A shuffle within segments of `width` lanes; a source outside of the segment leaves the value.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              cuda_emulator::Site site = cuda_emulator::here()) {
  const int first = static_cast<int>(cuda_emulator::lane()) & ~(width - 1);
  return cuda_emulator::shuffle_value("__shfl_sync", mask, value, first | (source & (width - 1)),
                                      site);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 cuda_emulator::Site site = cuda_emulator::here()) {
  const int lane = static_cast<int>(cuda_emulator::lane()), first = lane & ~(width - 1);
  const int source = lane - static_cast<int>(delta);
  return cuda_emulator::shuffle_value("__shfl_up_sync", mask, value,
                                      source < first ? cuda_emulator::kOwn : source, site);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   cuda_emulator::Site site = cuda_emulator::here()) {
  const int lane = static_cast<int>(cuda_emulator::lane()), end = (lane & ~(width - 1)) + width;
  const int source = lane + static_cast<int>(delta);
  return cuda_emulator::shuffle_value("__shfl_down_sync", mask, value,
                                      source >= end ? cuda_emulator::kOwn : source, site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32,
                  cuda_emulator::Site site = cuda_emulator::here()) {
  const int lane = static_cast<int>(cuda_emulator::lane()), end = (lane & ~(width - 1)) + width;
  const int source = lane ^ lane_mask;
  return cuda_emulator::shuffle_value("__shfl_xor_sync", mask, value,
                                      source >= end ? cuda_emulator::kOwn : source, site);
}

#define CUDA_EMULATOR_VOTE(Result, name, Value, kind)                                      \
  inline Result name(uint32_t mask, Value value,                                           \
                     cuda_emulator::Site site = cuda_emulator::here()) {                   \
    return static_cast<Result>(cuda_emulator::vote(cuda_emulator::Vote::kind, #name, mask, \
                                                   static_cast<uint64_t>(value), site));   \
  }
CUDA_EMULATOR_VOTE(uint32_t, __ballot_sync, bool, Ballot)
CUDA_EMULATOR_VOTE(int, __any_sync, bool, Any)
CUDA_EMULATOR_VOTE(int, __all_sync, bool, All)
CUDA_EMULATOR_VOTE(uint32_t, __match_any_sync, uint32_t, MatchAny)
CUDA_EMULATOR_VOTE(uint32_t, __match_any_sync, int, MatchAny)
CUDA_EMULATOR_VOTE(uint32_t, __match_any_sync, unsigned long long, MatchAny)
CUDA_EMULATOR_VOTE(uint32_t, __reduce_add_sync, uint32_t, Add)
CUDA_EMULATOR_VOTE(int, __reduce_add_sync, int, Add)
CUDA_EMULATOR_VOTE(uint32_t, __reduce_min_sync, uint32_t, Min)
CUDA_EMULATOR_VOTE(uint32_t, __reduce_max_sync, uint32_t, Max)
CUDA_EMULATOR_VOTE(uint32_t, __reduce_and_sync, uint32_t, And)
CUDA_EMULATOR_VOTE(uint32_t, __reduce_or_sync, uint32_t, Or)
CUDA_EMULATOR_VOTE(uint32_t, __reduce_xor_sync, uint32_t, Xor)
#undef CUDA_EMULATOR_VOTE

// Nothing promises that lanes converge: every lane sees itself alone.
inline uint32_t __activemask() { return 1u << cuda_emulator::lane(); }
