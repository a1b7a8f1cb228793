#include "checker.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <iterator>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "launch.h"

namespace cuda_emulator::checker {
namespace {

// NOTE [Order]
// Every block that runs gets a number of its own, across launches; launches follow each other. An
// access is stamped with its block, how many barriers the block had passed, and the clock of its
// warp, which moves at every __syncwarp and fence. `view` of a thread says up to which value of
// the clock it has seen what each lane of its warp did. So within a block an earlier access is
// ordered before a thread if it is the thread's own, or a barrier lies between, or the thread's
// view of that lane has passed it.
// Blocks are ordered by release and acquire only: __threadfence() and then an atomic leaves the
// thread's moment (all that was ordered before the fence) at the atomic's address; an atomic on
// that address makes it known to the thread that does it, and by barriers to others of its block.
struct Stamp {
  uint32_t block = 0;  // 0: never
  uint32_t barriers = 0;
  uint32_t clock = 0;
  int32_t program_counter = 0;  // from kAnchor
  uint16_t thread = 0;
  bool atomic = false;
};

using View = std::array<uint32_t, kWarpSize>;

struct Moment {
  uint32_t block = 0;
  uint32_t barriers = 0;
  unsigned thread = 0;
  View view{};
};

// What was last done to a byte.
struct Byte {
  Stamp write;
  // The last read since; what it was not ordered after are the reads of other lanes of its warp
  // (`lanes`), of other warps and of other blocks.
  Stamp read;
  uint32_t lanes = 0;
  bool other_warps = false, other_blocks = false;
  bool initialised = false;
  bool in_flight = false;  // an asynchronous copy has yet to write it
};

struct Region {
  size_t bytes;
  const char* shared_name;  // null for global memory
  std::vector<Byte> shadow;
};

struct Knowledge {
  Moment moment;
  Stamp acquired;
};

using Publications = std::map<std::pair<uint32_t, unsigned>, Moment>;  // by block and thread

struct State {
  const Launch* launch = nullptr;
  const char* stacks = nullptr;
  size_t stack_bytes = 0;

  std::map<const char*, Region> regions;  // by address

  uint32_t block = 0, first_block = 1;
  uint32_t barriers = 0;
  std::array<uint32_t, kMaxThreads / kWarpSize> clocks{};
  std::vector<View> views;
  std::vector<Moment> released;  // at each thread's last fence
  std::map<const void*, Publications> published;
  // What this block has learnt of others: by block, thread and the thread that learnt it.
  std::map<std::tuple<uint32_t, unsigned, unsigned>, Knowledge> known;

  std::vector<std::pair<const char*, const char*>> constants;  // read-only memory of the image
};
State state;

const char kAnchor = 0;

Stamp now(const void* program_counter, bool atomic) {
  const unsigned thread = current_thread();
  return {state.block,
          state.barriers,
          state.clocks[thread / kWarpSize],
          static_cast<int32_t>(static_cast<const char*>(program_counter) - &kAnchor),
          static_cast<uint16_t>(thread),
          atomic};
}

// Whether what a thread had seen at a moment covers an access of the same block.
bool covers(uint32_t barriers, unsigned thread, const View& view, const Stamp& earlier) {
  return earlier.barriers < barriers || (earlier.thread / kWarpSize == thread / kWarpSize &&
                                         view[earlier.thread % kWarpSize] > earlier.clock);
}

bool ordered(const Stamp& earlier);

bool usable(const Knowledge& knowledge) { return ordered(knowledge.acquired); }

// Whether an access comes before all that the running thread does from now on.
bool ordered(const Stamp& earlier) {
  if (earlier.block < state.first_block) return true;
  const unsigned thread = current_thread();
  if (earlier.block == state.block)
    return earlier.thread == thread || covers(state.barriers, thread, state.views[thread], earlier);
  const auto end = state.known.end();
  for (auto k = state.known.lower_bound({earlier.block, 0, 0});
       k != end && std::get<0>(k->first) == earlier.block; ++k) {
    const Moment& moment = k->second.moment;
    if (usable(k->second) && covers(moment.barriers, moment.thread, moment.view, earlier))
      return true;
  }
  return false;
}

// Whether the running thread has heard of every block before its own.
bool knows_all_blocks() {
  uint32_t count = 0, last = 0;
  for (const auto& [key, knowledge] : state.known)
    if (std::get<0>(key) != last && usable(knowledge)) {
      last = std::get<0>(key);
      ++count;
    }
  return count == state.block - state.first_block;
}

bool reads_ordered(const Byte& byte) {
  if (byte.read.block < state.first_block) return true;
  if (byte.other_blocks && !knows_all_blocks()) return false;
  if (byte.other_warps &&
      !(byte.read.block == state.block ? byte.read.barriers < state.barriers : ordered(byte.read)))
    return false;
  Stamp lane = byte.read;
  for (uint32_t rest = byte.lanes; rest; rest &= rest - 1) {
    lane.thread = static_cast<uint16_t>(byte.read.thread / kWarpSize * kWarpSize +
                                        static_cast<unsigned>(__builtin_ctz(rest)));
    if (!ordered(lane)) return false;
  }
  return true;
}

void note_read(Byte& byte, const Stamp& stamp) {
  const Stamp& last = byte.read;
  const bool same_warp = last.thread / kWarpSize == stamp.thread / kWarpSize;
  if (last.block < state.first_block) {
    byte.other_blocks = byte.other_warps = false;
    byte.lanes = 0;
  } else if (last.block != stamp.block) {
    byte.other_blocks = true;
    byte.other_warps = false;
    byte.lanes = 0;
  } else if (last.barriers != stamp.barriers) {
    byte.other_warps = false;
    byte.lanes = 0;
  } else if (!same_warp) {
    byte.other_warps = true;
    byte.lanes = 0;
  }
  byte.lanes |= 1u << stamp.thread % kWarpSize;
  byte.read = stamp;
}

const char* verb(Access kind) {
  return kind == Access::Read ? "read" : kind == Access::Write ? "write" : "atomic access";
}

std::string text_of(const char* address, const std::pair<const char* const, Region>& region) {
  const std::string name = region.second.shared_name
                               ? std::string("shared ") + region.second.shared_name
                               : std::string("global memory");
  return "byte " + std::to_string(address - region.first) + " of " + name + " (" +
         std::to_string(region.second.bytes) + " bytes)";
}

std::pair<const char* const, Region>* find(const char* address) {
  auto next = state.regions.upper_bound(address);
  if (next == state.regions.begin()) return nullptr;
  --next;
  return address < next->first + next->second.bytes ? &*next : nullptr;
}

// Where the nearest array lies, for accesses that are in none.
std::string nearest(const char* address) {
  const std::pair<const char* const, Region>* best = nullptr;
  ptrdiff_t distance = 0;
  for (const auto& region : state.regions) {
    const ptrdiff_t before = region.first - address;
    const ptrdiff_t after =
        address - (region.first + static_cast<ptrdiff_t>(region.second.bytes)) + 1;
    const ptrdiff_t away = std::max(before, after);
    if (!best || away < distance) {
      best = &region;
      distance = away;
    }
  }
  return best ? text_of(address, *best) : "memory that nobody announced";
}

bool is_constant(const char* address, size_t bytes) {
  if (state.constants.empty())
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
          const char* const base = reinterpret_cast<const char*>(info->dlpi_addr);
          std::vector<std::pair<const char*, const char*>> found;
          bool here = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD || segment.p_flags & PF_W) continue;
            const char* const begin = base + segment.p_vaddr;
            found.emplace_back(begin, begin + segment.p_memsz);
            here |= &kAnchor >= begin && &kAnchor < begin + segment.p_memsz;
          }
          if (here) state.constants = found;
          return here ? 1 : 0;
        },
        nullptr);
  for (const auto& [begin, end] : state.constants)
    if (address >= begin && address + bytes <= end) return true;
  return false;
}

void out_of_bounds(const char* address, size_t bytes, Access kind, const void* program_counter) {
  const auto* const arguments = static_cast<const char*>(state.launch->arguments);
  const bool argument =
      address >= arguments && address + bytes <= arguments + state.launch->code.arguments_size;
  if (kind == Access::Read && (argument || is_constant(address, bytes))) return;
  const std::string where = location(program_counter);
  if (argument || is_constant(address, bytes))
    fail("%s of constant memory at %s", verb(kind), where.c_str());
  if (address >= state.stacks && address < state.stacks + state.stack_bytes)
    fail("%s of another thread's local memory at %s", verb(kind), where.c_str());
  fail("out of bounds %s of %zu bytes at %s: %s", verb(kind), bytes, where.c_str(),
       nearest(address).c_str());
}

[[noreturn]] void race(const std::pair<const char* const, Region>& region, const char* address,
                       size_t bytes, Access kind, const void* program_counter, const Stamp& earlier,
                       const char* did) {
  const char* const other = &kAnchor + earlier.program_counter;
  const std::string place = earlier.block == state.block ? "" : " of another block";
  fail("race: %s of %zu bytes at %s, %s, which thread %u%s %s at %s", verb(kind), bytes,
       location(program_counter).c_str(), text_of(address, region).c_str(),
       static_cast<unsigned>(earlier.thread), place.c_str(), did, location(other).c_str());
}

}  // namespace

std::string location(const void* program_counter) {
  Dl_info image{};
  if (!dladdr(program_counter, &image)) return "?";
  char text[512];
  // A return address: the call lies just before it.
  const auto offset = static_cast<unsigned long>(static_cast<const char*>(program_counter) -
                                                 static_cast<const char*>(image.dli_fbase) - 1);
  std::snprintf(text, sizeof(text), "addr2line -s -e '%s' 0x%lx 2>/dev/null", image.dli_fname,
                offset);
  std::string line;
  if (FILE* const pipe = popen(text, "r")) {
    if (std::fgets(text, sizeof(text), pipe)) line = text;
    pclose(pipe);
  }
  line = line.substr(0, line.find_first_of(" \n"));
  if (!line.empty() && line[0] != '?') return line;
  std::snprintf(text, sizeof(text), "+0x%lx", offset);
  return text;
}

void add_buffer(const void* address, size_t bytes, bool initialised, bool reset) {
  if (!enabled || bytes == 0) return;
  const auto* const begin = static_cast<const char*>(address);
  const char *low = begin, *high = begin + bytes;
  std::vector<std::pair<const char*, Region>> overlapping;
  for (auto it = state.regions.begin(); it != state.regions.end();) {
    const char* const end = it->first + it->second.bytes;
    if (it->first >= begin + bytes || end <= begin) {
      ++it;
      continue;
    }
    if (!reset && it->first <= begin && end >= begin + bytes) return;
    if (!reset) {  // views of one tensor
      low = std::min(low, it->first);
      high = std::max(high, end);
      overlapping.emplace_back(it->first, std::move(it->second));
    }
    it = state.regions.erase(it);
  }
  Byte byte;
  byte.initialised = initialised;
  std::vector<Byte> shadow(static_cast<size_t>(high - low), byte);
  for (const auto& [address, region] : overlapping)
    std::copy(region.shadow.begin(), region.shadow.end(), shadow.begin() + (address - low));
  state.regions.emplace(low, Region{shadow.size(), nullptr, std::move(shadow)});
}

void forget_buffers() { state.regions.clear(); }

void begin_launch(const Launch& launch, const void* stacks, size_t stack_bytes) {
  if (!enabled) return;
  state.launch = &launch;
  state.stacks = static_cast<const char*>(stacks);
  state.stack_bytes = stack_bytes;
  state.first_block = state.block + 1;
  state.published.clear();
}

void end_block() {
  for (auto it = state.regions.begin(); it != state.regions.end();)
    it = it->second.shared_name ? state.regions.erase(it) : std::next(it);
}

void begin_block() {
  if (!enabled) return;
  ++state.block;
  state.barriers = 0;
  state.clocks.fill(0);
  state.views.assign(kMaxThreads, {});
  state.released.assign(kMaxThreads, {});
  state.known.clear();
}

void add_shared(const void* address, size_t bytes, const char* name) {
  if (!enabled) return;
  state.regions.insert_or_assign(static_cast<const char*>(address),
                                 Region{bytes, name, std::vector<Byte>(bytes)});
}

void barrier() { ++state.barriers; }

void sync_warp(unsigned warp, uint32_t mask) {
  if (!enabled) return;
  const uint32_t clock = ++state.clocks[warp];
  View* const views = &state.views[warp * kWarpSize];
  View joined{};
  for (unsigned l = 0; l < kWarpSize; ++l) {
    if (!(mask >> l & 1)) continue;
    for (unsigned i = 0; i < kWarpSize; ++i) joined[i] = std::max(joined[i], views[l][i]);
  }
  for (unsigned l = 0; l < kWarpSize; ++l)
    if (mask >> l & 1) joined[l] = clock;
  for (unsigned l = 0; l < kWarpSize; ++l)
    if (mask >> l & 1) views[l] = joined;
}

void fence(unsigned thread) {
  if (!enabled) return;
  View view = state.views[thread];
  view[thread % kWarpSize] = ++state.clocks[thread / kWarpSize];
  state.released[thread] = {state.block, state.barriers, thread, view};
}

namespace {

void synchronise(const char* address, const Stamp& stamp) {
  const Moment& released = state.released[stamp.thread];
  Publications& here = state.published[address];
  if (released.block) {
    for (const auto& [key, knowledge] : state.known)
      if (usable(knowledge)) here.insert({{std::get<0>(key), std::get<1>(key)}, knowledge.moment});
    here[{released.block, released.thread}] = released;
  }
  for (const auto& [key, moment] : here)
    if (moment.block != state.block)
      state.known.insert({{key.first, key.second, stamp.thread}, {moment, stamp}});
}

}  // namespace

void access(const void* address, size_t bytes, Access kind, const void* program_counter) {
  if (!enabled || !in_kernel() || on_own_stack(address)) return;
  const auto* const begin = static_cast<const char*>(address);
  auto* const region = find(begin);
  if (!region || begin + bytes > region->first + region->second.bytes)
    return out_of_bounds(begin, bytes, kind, program_counter);
  if (!region->second.shared_name) {
    if (kind != Access::Write) bytes_read += bytes;
    if (kind != Access::Read) bytes_written += bytes;
  }
  const Stamp stamp = now(program_counter, kind == Access::Atomic);
  if (kind == Access::Atomic && !region->second.shared_name) synchronise(begin, stamp);
  Byte* const shadow = &region->second.shadow[static_cast<size_t>(begin - region->first)];
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = shadow[i];
    if (byte.in_flight)
      fail("%s of %zu bytes at %s, where a cp.async is on its way: %s", verb(kind), bytes,
           location(program_counter).c_str(), text_of(begin + i, *region).c_str());
    if (kind != Access::Write && !byte.initialised)
      fail("uninitialised %s of %zu bytes at %s: %s", verb(kind), bytes,
           location(program_counter).c_str(), text_of(begin + i, *region).c_str());
    if (!(kind == Access::Atomic && byte.write.atomic) && !ordered(byte.write))
      race(*region, begin + i, bytes, kind, program_counter, byte.write, "wrote");
    if (kind == Access::Read) {
      note_read(byte, stamp);
      continue;
    }
    if (!reads_ordered(byte))
      race(*region, begin + i, bytes, kind, program_counter, byte.read, "read");
    byte.write = stamp;
    byte.read = {};
    byte.other_warps = byte.other_blocks = false;
    byte.initialised = true;
  }
}

void read_only(const void* address, size_t bytes, const void* program_counter) {
  if (!enabled || !in_kernel()) return;
  const auto* const begin = static_cast<const char*>(address);
  auto* const region = find(begin);
  if (!region) return;  // access() says what is wrong
  const size_t first = static_cast<size_t>(begin - region->first);
  for (size_t i = 0; i < std::min(bytes, region->second.bytes - first); ++i) {
    const Stamp& write = region->second.shadow[first + i].write;
    if (write.block >= state.first_block)
      fail("read of %zu bytes through the read-only cache at %s, %s, which this launch wrote at %s",
           bytes, location(program_counter).c_str(), text_of(begin + i, *region).c_str(),
           location(&kAnchor + write.program_counter).c_str());
  }
}

namespace {

void set_in_flight(const void* address, size_t bytes, bool value) {
  const auto* const begin = static_cast<const char*>(address);
  auto* const region = find(begin);  // access() has found it, or ended the launch
  Byte* const shadow = &region->second.shadow[static_cast<size_t>(begin - region->first)];
  for (size_t i = 0; i < bytes; ++i) shadow[i].in_flight = value;
}

}  // namespace

void begin_copy(const void* address, size_t bytes, const void* program_counter) {
  if (!enabled) return;
  access(address, bytes, Access::Write, program_counter);
  set_in_flight(address, bytes, true);
}

void end_copy(const void* address, size_t bytes, const void* program_counter) {
  if (!enabled) return;
  set_in_flight(address, bytes, false);
  access(address, bytes, Access::Write, program_counter);
}

void wrote(const void* address, size_t bytes) {
  const auto* const begin = static_cast<const char*>(address);
  if (auto* const region = find(begin))
    for (size_t i = 0; i < bytes && begin + i < region->first + region->second.bytes; ++i)
      region->second.shadow[static_cast<size_t>(begin - region->first) + i].initialised = true;
}

}  // namespace cuda_emulator::checker
