#pragma once
#include <cstdint>

#include "common/formula.h"
#include "common/isa.h"

namespace secateur::topk {

// Elements of one unit of work; a multiple of 64, so that units write whole bytes of the mask.
constexpr int64_t kChunk = 4096;
constexpr int kBins = 2048;

// One tensor of the list.
struct Item {
  ScoreInputs inputs;
  const uint8_t* alive;  // bit-packed; null = every element
  uint8_t* mask;         // bit-packed, written
  int64_t* counts;       // keys above and inside the interval, added to by a histogram; null = no
  int64_t numel;
  int64_t first_element, first_chunk;  // how many the items before it have
};

// The candidates of one chunk: keys[begin..begin + count] and their offsets in the chunk. Once the
// winners are chosen, only the offsets of those that tie with the k-th.
struct Candidates {
  int64_t begin;
  int64_t count;
};

enum class Step : int32_t { Sample, Sweep, Histogram, Choose, Fill, Done };

// Either the `keep` best elements are wanted, or (by_threshold) those no worse than `threshold`.
struct Problem {
  const Item* items;
  int64_t n_items;
  int64_t numel;     // of all items
  int64_t n_chunks;  // of all items
  Mode mode;
  bool wide;     // scores are double, else float
  bool largest;  // whether larger scores are better
  bool finite;   // whether an infinite score is an error; NaN always is
  bool by_threshold;
  double threshold;
  int64_t keep;
};

// The selection as a state machine: while step is not Done, run() does tasks 0 to n_tasks of the
// step, in any order and on any threads, and advance() chooses the next step.
// Scores are compared as keys: integers in the order of preference, the score's width.
struct Search : Problem {
  // Working memory: n_chunks candidates, `capacity` keys (of the score's width) and offsets.
  Candidates* candidates;
  void* keys;
  uint16_t* offsets;
  int64_t capacity;

  // State, set up by start().
  Step step;
  int64_t n_tasks;
  int64_t alive;          // elements to choose from
  int64_t bad_item;       // the first item with a score that is an error, or n_items
  int64_t low, high;      // keys of the interval that is looked into, both included
  int64_t base;           // elements above the interval, when a histogram is taken
  int64_t above, inside;  // counted by a sweep
  int64_t pooled;         // keys written
  int64_t ties;           // how many elements of key `low` are kept in the last chunk to be filled
  int shift;              // of a key in the interval to its bin
  int64_t histogram[kBins];
};

// start_histogram() begins a histogram of the keys in low..high, which it clips to the keys there
// are; the one step that follows leaves it, with bad_item, alive and the items' counts.

// The memory that a selection among `numel` scores wants: entries of `keys` and `offsets`.
using Capacity = int64_t(int64_t numel);
using Advance = void(Search& search);
using Run = void(Search& search, int64_t begin, int64_t end);

SECATEUR_PER_ISA(Capacity capacity; Advance start; Advance start_histogram; Advance advance;
                 Run run)

// On a CUDA stream; they return a cudaError_t. `workspace` is device memory, aligned to 16 bytes,
// of as many bytes as workspace_bytes() says; `info` are two numbers, written: the first item with
// a score that is an error, or -1, and how many elements there are to choose from.
namespace CUDA {

// How many elements a selection among `numel` wants room for, and a histogram: none.
int64_t capacity(int64_t numel);
int64_t workspace_bytes(const Problem& problem, int64_t capacity);
int select(const Problem& problem, int64_t capacity, void* workspace, int64_t* info, void* stream);
// bins[kBins], zero before: how many keys of low..high, clipped to the keys there are, each holds.
int histogram(const Problem& problem, int64_t low, int64_t high, void* workspace, int64_t* bins,
              int64_t* info, void* stream);

}  // namespace CUDA
}  // namespace secateur::topk
