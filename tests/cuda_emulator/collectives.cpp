// What the lanes of a warp exchange once all of them have arrived.
#include "collectives.h"

namespace cuda_emulator {
namespace {

template <typename F>
void for_lanes(uint32_t mask, F&& f) {
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) f(lane);
}

struct Shuffle {
  uint64_t in, out;
  int source;
};

void exchange_shuffle(WarpCall* const* calls, uint32_t mask) {
  const auto of = [&](unsigned lane) -> Shuffle& {
    return *static_cast<Shuffle*>(calls[lane]->data);
  };
  for_lanes(mask, [&](unsigned lane) {
    const int source = of(lane).source == kOwn ? static_cast<int>(lane) : of(lane).source;
    if (!(mask >> source & 1))
      fail("%s with mask %08x: lane %u reads from lane %d, which the mask does not name",
           calls[lane]->name, mask, lane, source);
    of(lane).out = of(static_cast<unsigned>(source)).in;
  });
}

struct Ballot {
  Vote kind;
  uint64_t in, out;
};

uint64_t combine(Vote kind, uint64_t a, uint64_t b) {
  switch (kind) {
    case Vote::Any:
    case Vote::Or:
      return a | b;
    case Vote::All:
    case Vote::And:
      return a & b;
    case Vote::Xor:
      return a ^ b;
    case Vote::Add:
      return a + b;
    case Vote::Min:
      return a < b ? a : b;
    case Vote::Max:
      return a > b ? a : b;
    default:
      return 0;
  }
}

void exchange_votes(WarpCall* const* calls, uint32_t mask) {
  const auto of = [&](unsigned lane) -> Ballot& {
    return *static_cast<Ballot*>(calls[lane]->data);
  };
  const unsigned first = static_cast<unsigned>(__builtin_ctz(mask));
  const Vote kind = of(first).kind;
  uint64_t ballot = 0, combined = of(first).in;
  for_lanes(mask, [&](unsigned lane) {
    ballot |= (of(lane).in & 1) << lane;
    if (lane != first) combined = combine(kind, combined, of(lane).in);
  });
  for_lanes(mask, [&](unsigned lane) {
    of(lane).out = kind == Vote::Ballot ? ballot : combined;
    if (kind != Vote::MatchAny) return;
    of(lane).out = 0;
    for_lanes(mask, [&](unsigned other) {
      of(lane).out |= uint64_t{of(other).in == of(lane).in} << other;
    });
  });
}

void exchange_order(WarpCall* const*, uint32_t mask) { order_warp(mask); }

}  // namespace

uint64_t shuffle(const char* name, uint32_t mask, uint64_t bits, int source, Site site) {
  Shuffle data{bits, 0, source};
  WarpCall call{name, mask, exchange_shuffle, &data, site};
  wait_for_warp(call);
  return data.out;
}

uint64_t vote(Vote kind, const char* name, uint32_t mask, uint64_t value, Site site) {
  Ballot data{kind, value, 0};
  WarpCall call{name, mask, exchange_votes, &data, site};
  wait_for_warp(call);
  return data.out;
}

void sync_warp(uint32_t mask, Site site) {
  WarpCall call{"__syncwarp", mask, exchange_order, nullptr, site};
  wait_for_warp(call);
}

}  // namespace cuda_emulator
