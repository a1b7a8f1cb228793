// Runs a launch: blocks one after the other, the threads of a block as fibers that take turns
// whenever one has to wait.
#include "launch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checker.h"
#include "collectives.h"
#include "emulator.h"
#include "fiber.h"

namespace cuda_emulator {
namespace {

// Limits of compute capability 8.0 and later.
constexpr unsigned kMaxGridYZ = 65535;
constexpr size_t kMaxStaticShared = 48 << 10;
constexpr size_t kMaxShared = 99 << 10;

// As float, half and bfloat16 this is NaN; as an index it is far out of bounds.
constexpr uint32_t kPoison = 0xffc0deadu;

constexpr size_t kStackBytes = 128 << 10;

enum class State { Ready, AtBarrier, InWarp, Done };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  // Where it waits, if it does.
  const char* waits_for;
  Site site;
  WarpCall* call;
};

// The stacks of a block's threads, each with a page below it that may not be touched.
class Stacks {
 public:
  Stacks() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* const memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("CUDA emulator: no memory for stacks");
    memory_ = static_cast<char*>(memory);
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(of(i) - page_, page_, PROT_NONE);
  }
  size_t bytes() const { return kMaxThreads * (page_ + kStackBytes); }
  const char* all() const { return memory_; }
  char* of(unsigned thread) const { return memory_ + thread * (page_ + kStackBytes) + page_; }

 private:
  size_t page_;
  char* memory_;
};

struct Shared {
  const void* array;
  size_t bytes;
};

struct Machine {
  std::mutex one_launch_at_a_time;
  const Launch* launch = nullptr;
  uint64_t launches = 0;
  uint3 block{};
  std::vector<Thread> threads;
  Thread* current = nullptr;
  std::string error;

  // The barrier that some threads have reached.
  unsigned arrived = 0;
  const Thread* first_to_arrive = nullptr;
  Barrier barrier_kind{};
  int predicates = 0, barrier_result = 0;

  std::vector<Shared> opened;  // static shared arrays of this block
  alignas(128) unsigned char dynamic_shared[kMaxShared];
  std::map<const void*, size_t> allowed_dynamic_shared;
  std::map<const void*, size_t> most_dynamic_shared;  // of the kernels that were launched

  uint64_t seed = 0;
  std::minstd_rand random;

  const Stacks& stacks() {
    static const Stacks stacks;
    return stacks;
  }
};
Machine machine;

// Filled before main() by other files, so it must be there when the first one comes.
std::map<const void*, Code>& replaced() {
  static std::map<const void*, Code> codes;
  return codes;
}

unsigned index_of(const Thread& thread) {
  return static_cast<unsigned>(&thread - machine.threads.data());
}

void poison(void* memory, size_t bytes) {
  auto* const p = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < bytes; ++i) p[i] = static_cast<unsigned char>(kPoison >> i % 4 * 8);
}

void suspend() { machine.current->fiber.suspend(); }

// How threads are named in messages: "0-31, 40".
std::string ranges(const std::vector<unsigned>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t last = i;
    while (last + 1 < sorted.size() && sorted[last + 1] == sorted[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(sorted[i]);
    if (last > i) text += "-" + std::to_string(sorted[last]);
    i = last + 1;
  }
  return text;
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string text_of(Site site) {
  return std::string(base_name(site.file)) + ":" + std::to_string(site.line);
}

std::string what_it_does(const Thread& thread) {
  if (thread.state == State::Done) return "exited";
  std::string text = std::string("waiting in ") + thread.waits_for;
  if (thread.state == State::InWarp) {
    char mask[24];
    std::snprintf(mask, sizeof(mask), " (mask %08x)", thread.call->mask);
    text += mask;
  }
  return text + " at " + text_of(thread.site);
}

std::string place() {
  const uint3 b = machine.block;
  return std::string("CUDA emulator: ") + machine.launch->name + ", block (" + std::to_string(b.x) +
         ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
}

void report_deadlock() {
  std::map<std::string, std::vector<unsigned>> groups;
  for (const Thread& thread : machine.threads)
    groups[what_it_does(thread)].push_back(index_of(thread));
  std::string text;
  for (const auto& [what, members] : groups)
    text += (text.empty() ? "" : "; ") + ("threads " + ranges(members)) + " " + what;
  machine.error = place() + ": deadlock: " + text;
}

// A CUDA thread from its first instruction to its last.
void thread_main() {
  const Launch& launch = *machine.launch;
  launch.code.body(launch.kernel, launch.arguments);
  machine.current->state = State::Done;
  suspend();
}

void begin_block(uint64_t linear) {
  const Launch& launch = *machine.launch;
  const dim3 grid = launch.grid, size = launch.block;
  machine.block = {static_cast<unsigned>(linear % grid.x),
                   static_cast<unsigned>(linear / grid.x % grid.y),
                   static_cast<unsigned>(linear / grid.x / grid.y)};
  machine.arrived = 0;
  machine.opened.clear();
  forget_copies();
  checker::begin_block();
  if (launch.shared_bytes) {
    poison(machine.dynamic_shared, launch.shared_bytes);
    checker::add_shared(machine.dynamic_shared, launch.shared_bytes, "memory");
  }
  for (Thread& thread : machine.threads) {
    const unsigned i = index_of(thread);
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.state = State::Ready;
    thread.fiber.start(machine.stacks().of(i), kStackBytes, thread_main);
  }
}

// Lets every thread of a range run until it has to wait; false if none could.
bool take_turns(const std::vector<unsigned>& threads) {
  bool progress = false;
  for (const unsigned i : threads) {
    Thread& thread = machine.threads[i];
    if (thread.state != State::Ready || !machine.error.empty()) continue;
    progress = true;
    machine.current = &thread;
    thread.fiber.resume();
    machine.current = nullptr;
  }
  return progress;
}

// Seed 0 runs threads in order. Odd seeds shuffle them every round, so that warps go at the same
// pace; even seeds let a warp run as far ahead of the others as it can.
void run_block() {
  std::vector<std::vector<unsigned>> groups;  // all threads, or warps
  const bool ahead = machine.seed && machine.seed % 2 == 0;
  const size_t size = ahead ? kWarpSize : kMaxThreads;
  for (unsigned i = 0; i < machine.threads.size(); ++i) {
    if (i % size == 0) groups.emplace_back();
    groups.back().push_back(i);
  }
  const int turns = ahead ? 1000 : 1;  // a warp that polls would go on forever
  for (bool progress = true; progress && machine.error.empty();) {
    progress = false;
    if (machine.seed) {
      std::shuffle(groups.begin(), groups.end(), machine.random);
      for (auto& group : groups) std::shuffle(group.begin(), group.end(), machine.random);
    }
    for (const auto& group : groups)
      for (int turn = 0; turn < turns && take_turns(group); ++turn) progress = true;
  }
  if (!machine.error.empty()) return;
  for (const Thread& thread : machine.threads)
    if (thread.state != State::Done) return report_deadlock();
}

[[noreturn]] void refuse(const Launch& launch, const std::string& why) {
  throw std::runtime_error(std::string("CUDA emulator: launch of ") + launch.name + ": " + why);
}

const Code& replacement_of(const Launch& launch) {
  const auto found = replaced().find(launch.kernel);
  if (found == replaced().end()) refuse(launch, "expected a kernel that nvcc has seen as well");
  const Code& code = found->second;
  if (code.arguments_size != launch.code.arguments_size)
    refuse(launch, "expected " + std::to_string(code.arguments_size) +
                       " bytes of parameters, as nvcc has it, got " +
                       std::to_string(launch.code.arguments_size));
  return code;
}

void check_limits(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    refuse(launch, "expected 1 to 1024 threads a block, 64 at most along z, got " + text(block));
  if (threads > launch.code.max_threads)
    refuse(launch, "expected at most " + std::to_string(launch.code.max_threads) +
                       " threads a block, as its __launch_bounds__ say, got " + text(block));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ)
    refuse(launch,
           "expected a grid of at least 1, at most 2^31 - 1 by 65535 by 65535 blocks, got " +
               text(grid));
  const auto found = machine.allowed_dynamic_shared.find(launch.kernel);
  const size_t allowed =
      found == machine.allowed_dynamic_shared.end() ? kMaxStaticShared : found->second;
  if (launch.shared_bytes > allowed)
    refuse(launch,
           "expected at most " + std::to_string(allowed) +
               " bytes of dynamic shared memory (more is allowed by cudaFuncSetAttribute), got " +
               std::to_string(launch.shared_bytes));
}

}  // namespace

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.block; }
dim3 block_size() { return machine.launch->block; }
dim3 grid_size() { return machine.launch->grid; }
unsigned lane() { return current_thread() % kWarpSize; }
bool in_kernel() { return machine.current != nullptr; }
unsigned current_thread() { return index_of(*machine.current); }
bool on_own_stack(const void* address) {
  const char* const stack = machine.stacks().of(current_thread());
  return address >= stack && address < stack + kStackBytes;
}
void set_seed(uint64_t seed) { machine.seed = seed; }

void replace(const void* kernel, const Code& code) { replaced()[kernel] = code; }

void run(Launch launch) {
  const std::lock_guard<std::mutex> lock(machine.one_launch_at_a_time);
  if (!replaced().empty()) launch.code = replacement_of(launch);
  check_limits(launch);
  size_t& most = machine.most_dynamic_shared[launch.kernel];
  most = std::max(most, launch.shared_bytes);
  machine.launch = &launch;
  ++machine.launches;
  machine.error.clear();
  machine.random.seed(static_cast<std::minstd_rand::result_type>(machine.seed));
  machine.threads.resize(launch.block.x * launch.block.y * launch.block.z);
  checker::begin_launch(launch, machine.stacks().all(), machine.stacks().bytes());

  std::vector<uint64_t> blocks(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (machine.seed) std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (const uint64_t block : blocks) {
    begin_block(block);
    run_block();
    checker::end_block();
    if (!machine.error.empty()) break;
  }
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
}

uint64_t launches() { return machine.launches; }

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  const uint3 t = machine.current->index;
  machine.error = place() + ", thread (" + std::to_string(t.x) + ", " + std::to_string(t.y) + ", " +
                  std::to_string(t.z) + "): " + message;
  suspend();  // for good: the launch is over
  __builtin_unreachable();
}

void reschedule() {
  if (machine.seed && machine.random() % 4 == 0) suspend();
}

int wait_for_block(Barrier kind, const char* name, int predicate, Site site) {
  Thread& self = *machine.current;
  self.site = site;
  self.waits_for = name;
  if (machine.arrived == 0) {
    machine.first_to_arrive = &self;
    machine.barrier_kind = kind;
    machine.predicates = 0;
  }
  const Thread& first = *machine.first_to_arrive;
  if (machine.barrier_kind != kind || !same(first.site, site))
    fail("divergent barrier: %s at %s, while thread %u is %s", name, text_of(site).c_str(),
         index_of(first), what_it_does(first).c_str());
  machine.predicates += predicate != 0;
  self.state = State::AtBarrier;
  const unsigned threads = static_cast<unsigned>(machine.threads.size());
  if (++machine.arrived == threads) {
    const int count = machine.predicates;
    machine.arrived = 0;
    machine.barrier_result = kind == Barrier::And  ? count == static_cast<int>(threads)
                             : kind == Barrier::Or ? count > 0
                                                   : count;
    for (Thread& thread : machine.threads) thread.state = State::Ready;
    checker::barrier();
  }
  suspend();
  return machine.barrier_result;
}

void wait_for_warp(WarpCall& call) {
  Thread& self = *machine.current;
  const unsigned lane = current_thread() % kWarpSize;
  const unsigned first = current_thread() - lane;
  const unsigned count = std::min(kWarpSize, static_cast<unsigned>(machine.threads.size()) - first);
  Thread* const warp = &machine.threads[first];
  if (call.mask == kFullMask) call.mask >>= kWarpSize - count;  // all there are
  if (!(call.mask >> lane & 1))
    fail("%s with mask %08x, which does not name its own lane %u", call.name, call.mask, lane);
  self.site = call.site;
  self.waits_for = call.name;
  self.call = &call;
  self.state = State::InWarp;
  WarpCall* calls[kWarpSize] = {};
  bool complete = true;
  for (unsigned l = 0; l < kWarpSize; ++l) {
    if (!(call.mask >> l & 1)) continue;
    if (l >= count) fail("%s with mask %08x, but lane %u does not exist", call.name, call.mask, l);
    const Thread& other = warp[l];
    if (other.state == State::Done)
      fail("%s with mask %08x, but lane %u has exited", call.name, call.mask, l);
    if (other.state != State::InWarp) {
      complete = false;
      continue;
    }
    calls[l] = other.call;
    if (other.call->mask != call.mask || std::strcmp(other.call->name, call.name) != 0)
      fail("divergent warp: %s with mask %08x at %s, while lane %u is %s", call.name, call.mask,
           text_of(call.site).c_str(), l, what_it_does(other).c_str());
  }
  if (!complete) return suspend();
  call.exchange(calls, call.mask);
  for (unsigned l = 0; l < kWarpSize; ++l)
    if (calls[l]) warp[l].state = State::Ready;
}

void order_warp(uint32_t mask) { checker::sync_warp(current_thread() / kWarpSize, mask); }

void open_shared(void* array, size_t bytes, const char* name) {
  size_t total = bytes;
  for (const Shared& shared : machine.opened) {
    if (shared.array == array) return;
    total += shared.bytes;
  }
  if (total > kMaxStaticShared)
    fail("expected at most %zu bytes of static shared memory, got %zu", kMaxStaticShared, total);
  // Without cudaFuncSetAttribute the limit is for both together.
  const Launch& launch = *machine.launch;
  const size_t allowed =
      machine.allowed_dynamic_shared.contains(launch.kernel) ? kMaxShared : kMaxStaticShared;
  if (total + launch.shared_bytes > allowed)
    fail("expected at most %zu bytes of shared memory, got %zu static and %zu dynamic", allowed,
         total, launch.shared_bytes);
  machine.opened.push_back({array, bytes});
  poison(array, bytes);
  checker::add_shared(array, bytes, name);
}

void* dynamic_shared() { return machine.dynamic_shared; }

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxShared)
    throw std::runtime_error("CUDA emulator: expected at most " + std::to_string(kMaxShared) +
                             " bytes of dynamic shared memory, got " + std::to_string(bytes));
  machine.allowed_dynamic_shared[kernel] = bytes;
}

void before_read_only(const void* address, size_t bytes) {
  checker::read_only(address, bytes, __builtin_return_address(0));
}

void before_atomic(const void* address, size_t bytes, const void* program_counter) {
  reschedule();
  checker::access(address, bytes, checker::Access::Atomic, program_counter);
}

void fence() {
  reschedule();
  checker::fence(current_thread());
}

void fill_buffer(void* address, int value, size_t bytes) {
  std::memset(address, value, bytes);
  checker::wrote(address, bytes);
}

}  // namespace cuda_emulator

extern "C" {

// The linker's name for where this library begins.
__attribute__((visibility("hidden"))) extern const unsigned char __ehdr_start[];

// Calls f with the place in this library of every kernel that was launched, and the most bytes of
// dynamic shared memory that a launch of it asked for.
void cuda_emulator_each_dynamic_shared(void (*f)(size_t place, size_t bytes)) {
  for (const auto& [kernel, bytes] : cuda_emulator::machine.most_dynamic_shared)
    f(static_cast<size_t>(static_cast<const unsigned char*>(kernel) - __ehdr_start), bytes);
}

}  // extern "C"
