// The runtime of `g++ -fsanitize=thread`, in the place of libtsan: what instrumented kernels read
// and write, held against what the stand-in orders. It is not instrumented itself.
//
// Order comes from barriers alone, so that two counters of a thread tell all: barriers of its block
// that it has passed, and those of its warp. An access comes before another one where its thread is
// the same, or its count of block barriers is lower, or, in the same warp, that of warp barriers.
// Blocks of a launch are never ordered.
#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "observe.h"
#include "source_lines.h"

namespace {

constexpr int32_t kNobody = -1;
constexpr int32_t kMany = -2;
constexpr uint32_t kManyBlocks = 0xFFFFFFFFU;
constexpr size_t kMostTold = 4;

// An address in the code; below kFirstAddress, the number of several, the innermost first.
using Place = uintptr_t;
constexpr Place kFirstAddress = 1 << 16;

// One access, or several of one kind that nothing orders: then of kMany threads, or warps.
struct Access {
  uint32_t launch = 0;  // 0: there was none
  uint32_t block = 0;   // over all launches; or kManyBlocks of one
  int32_t thread = kNobody, warp = kNobody;
  uint32_t met = 0, warp_met = 0;
  Place place = 0;
};

// Of one byte.
struct Shadow {
  Access write, reads, atomics;
  uint32_t copied_by = 0;  // the block with a copy to it under way
  bool is_defined = false;
};

struct Region {
  const char* begin;
  size_t bytes;
  std::vector<Shadow> shadows;
  bool is_shared;
};

struct Fiber {
  std::vector<uintptr_t> calls;  // addresses, the innermost last
};

struct Checker {
  std::vector<Region> global;
  Region shared{nullptr, 0, {}, true};
  std::vector<Fiber> fibers;
  std::vector<uint32_t> warp_met;
  const char *low = nullptr, *high = nullptr;  // around global regions
  uint32_t launches = 0, blocks = 0;
  int32_t block = 0;  // in its launch
  uint32_t met = 0;
  int32_t thread = kNobody;
  int32_t faults = 0;
  bool is_busy = false;  // its own code
  std::map<std::vector<uintptr_t>, Place> numbers;
  std::vector<std::vector<uintptr_t>> numbered;
  std::map<std::pair<std::string, Place>, int32_t> told;
};
Checker checker;

Region* region_of(const char* at) {
  Region& shared = checker.shared;
  if (at >= shared.begin && at < shared.begin + shared.bytes) return &shared;
  if (at < checker.low || at >= checker.high) return nullptr;
  for (Region& region : checker.global) {
    if (at >= region.begin && at < region.begin + region.bytes) return &region;
  }
  return nullptr;
}

// Where a thread is that runs the stand-in's own code: there, and from where it was called.
Place called_place(uintptr_t address) {
  if (checker.thread < 0) return address;
  constexpr size_t kCalls = 3;
  checker.is_busy = true;
  const auto& calls = checker.fibers[checker.thread].calls;
  std::vector<uintptr_t> stack = {address};
  stack.insert(stack.end(), calls.rbegin(), calls.rbegin() + std::min(kCalls, calls.size()));
  const auto [found, is_new] = checker.numbers.emplace(stack, checker.numbered.size());
  if (is_new) checker.numbered.push_back(stack);
  checker.is_busy = false;
  return found->second;
}

std::string line_of(Place place) {
  if (place >= kFirstAddress) return permattn_shim::source_line({place});
  return permattn_shim::source_line(checker.numbered.at(place));
}

Access this_access(Place place) {
  const int32_t warp = checker.thread / 32;
  return {checker.launches, checker.blocks,         checker.thread, warp,
          checker.met,      checker.warp_met[warp], place};
}

// Shared memory of two blocks is not the same.
bool comes_before(const Access& a, const Access& now, bool is_shared) {
  if (a.launch != now.launch) return true;
  if (a.block != now.block) return is_shared;
  return a.thread == now.thread || a.met < now.met ||
         (a.warp == now.warp && a.warp_met < now.warp_met);
}

// What counts is only what a later access could miss.
void add(Access& all, const Access& now, bool is_shared) {
  if (comes_before(all, now, is_shared)) {
    all = now;
    return;
  }
  all.thread = all.thread == now.thread ? now.thread : kMany;
  all.warp = all.warp == now.warp && all.block == now.block ? now.warp : kMany;
  // A later block cannot come after an earlier one.
  all.block = all.block == now.block ? now.block : kManyBlocks;
  all.place = now.place;
}

std::string told_as(const Access& a) {
  const std::string where = line_of(a.place);
  if (a.block == kManyBlocks) return "threads of several blocks, last at " + where;
  if (a.thread == kMany) return "several threads, last at " + where;
  return "thread " + std::to_string(a.thread) +
         (a.block == checker.blocks ? "" : " of another block") + " at " + where;
}

void tell(const std::string& what, const Region& region, size_t at, const Access& now,
          const Access* before) {
  ++checker.faults;
  if (checker.told[{what, now.place}]++ > 0 || checker.told.size() > kMostTold) return;
  std::fprintf(stderr, "race checker: %s\n  block %d, thread %d at %s\n", what.c_str(),
               checker.block, checker.thread, line_of(now.place).c_str());
  if (before != nullptr && before->launch != 0) {
    std::fprintf(stderr, "  before: %s\n", told_as(*before).c_str());
  }
  std::fprintf(stderr, "  byte %zu of %s\n", at,
               region.is_shared ? "shared memory" : "global memory");
}

enum class Kind { kRead, kWrite, kAtomic, kCopy };

// Whether the byte was written at all: shared memory by this block, global memory ever.
bool is_defined(const Region& region, const Shadow& s) {
  if (!region.is_shared) return s.is_defined;
  return s.write.block == checker.blocks || s.atomics.block == checker.blocks;
}

const char* fault_of(const Region& region, const Shadow& s, const Access& now, Kind kind,
                     const Access*& before) {
  before = &s.write;
  if (s.copied_by == checker.blocks) {
    return kind == Kind::kRead ? "a read of bytes that a copy still writes"
                               : "a write to bytes that a copy still writes";
  }
  const bool is_shared = region.is_shared;
  if (!comes_before(s.write, now, is_shared)) {
    return kind == Kind::kRead ? "a read that nothing orders after a write"
                               : "a write that nothing orders after a write";
  }
  before = &s.reads;
  if (kind != Kind::kRead && !comes_before(s.reads, now, is_shared)) {
    return "a write that nothing orders after a read";
  }
  before = &s.atomics;
  if (kind != Kind::kAtomic && !comes_before(s.atomics, now, is_shared)) {
    return "an access that nothing orders after an atomic one";
  }
  before = nullptr;
  const bool reads = kind == Kind::kRead || kind == Kind::kAtomic;
  return reads && !is_defined(region, s) ? "a read of what nothing wrote" : nullptr;
}

void access(const void* address, size_t bytes, Kind kind, Place place) {
  if (checker.thread < 0 || checker.is_busy) return;
  const auto* first = static_cast<const char*>(address);
  Region* region = region_of(first);
  if (region == nullptr) return;
  checker.is_busy = true;
  const Access now = this_access(place);
  const auto offset = static_cast<size_t>(first - region->begin);
  const size_t stop = offset + bytes < region->bytes ? offset + bytes : region->bytes;
  const char* told = nullptr;  // once an access
  for (size_t at = offset; at < stop; ++at) {
    Shadow& s = region->shadows[at];
    const Access* before = nullptr;
    const char* what = fault_of(*region, s, now, kind, before);
    if (what != nullptr && what != told) tell(told = what, *region, at, now, before);
    if (kind == Kind::kRead) {
      add(s.reads, now, region->is_shared);
    } else if (kind == Kind::kAtomic) {
      add(s.atomics, now, region->is_shared);
    } else {
      s.write = now;
      s.reads = s.atomics = Access{};
    }
    if (kind != Kind::kRead) s.is_defined = true;
    if (kind == Kind::kCopy) s.copied_by = checker.blocks;
  }
  checker.is_busy = false;
}

}  // namespace

namespace shim::observe {

void add_region(const void* begin, size_t bytes, bool is_defined) {
  const auto* first = static_cast<const char*>(begin);
  Region region{first, bytes, std::vector<Shadow>(bytes), false};
  for (Shadow& s : region.shadows) s.is_defined = is_defined;
  checker.global.push_back(std::move(region));
  if (checker.low == nullptr || first < checker.low) checker.low = first;
  if (first + bytes > checker.high) checker.high = first + bytes;
}

int32_t faults() { return checker.faults; }

void launch_begins() { ++checker.launches; }

void block_begins(int32_t block, int32_t threads, const char* shared, size_t shared_bytes) {
  checker.is_busy = true;
  ++checker.blocks;
  checker.block = block;
  checker.met = 0;
  checker.shared.begin = shared;
  checker.shared.bytes = shared_bytes;
  if (checker.shared.shadows.size() < shared_bytes) checker.shared.shadows.resize(shared_bytes);
  checker.fibers.assign(threads, {});
  checker.warp_met.assign((threads + 31) / 32, 0);
  checker.is_busy = false;
}

void block_ends() {
  checker.shared.bytes = 0;
  checker.thread = kNobody;
}

void goes_on(int32_t thread) { checker.thread = thread; }
void threads_met() { ++checker.met; }
void lanes_met(int32_t warp) { ++checker.warp_met[warp]; }

#define HERE reinterpret_cast<uintptr_t>(__builtin_return_address(0))

void reads(const void* from, size_t bytes) { access(from, bytes, Kind::kRead, called_place(HERE)); }

void copy_begins(const void* to, const void* from, size_t bytes_read) {
  const Place place = called_place(HERE);
  access(from, bytes_read, Kind::kRead, place);
  access(to, 16, Kind::kCopy, place);
}

void copy_ends(const void* to) {
  const Region& region = checker.shared;
  const auto offset = static_cast<size_t>(static_cast<const char*>(to) - region.begin);
  for (size_t at = offset; at < offset + 16; ++at) checker.shared.shadows[at].copied_by = 0;
  access(to, 16, Kind::kWrite, called_place(HERE));
}

}  // namespace shim::observe

// What g++ calls. Orders of atomics are not looked at: none is an order of anything else.
extern "C" {

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void __tsan_func_entry(void* place) {
  if (checker.thread < 0 || checker.is_busy) return;
  checker.fibers[checker.thread].calls.push_back(reinterpret_cast<uintptr_t>(place));
}
void __tsan_func_exit() {
  if (checker.thread < 0 || checker.is_busy) return;
  auto& calls = checker.fibers[checker.thread].calls;
  if (!calls.empty()) calls.pop_back();
}

#define ACCESSES(bytes)                                                               \
  void __tsan_read##bytes(void* p) { access(p, bytes, Kind::kRead, HERE); }           \
  void __tsan_write##bytes(void* p) { access(p, bytes, Kind::kWrite, HERE); }         \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, Kind::kRead, HERE); } \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, Kind::kWrite, HERE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, Kind::kRead, HERE); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, Kind::kWrite, HERE); }

uint32_t __tsan_atomic32_load(const volatile uint32_t* p, int) { return *p; }
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t x, int) {
  access(const_cast<uint32_t*>(p), 4, Kind::kAtomic, HERE);
  const uint32_t was = *p;
  *p = was + x;
  return was;
}
uint32_t __tsan_atomic32_fetch_or(volatile uint32_t* p, uint32_t x, int) {
  access(const_cast<uint32_t*>(p), 4, Kind::kAtomic, HERE);
  const uint32_t was = *p;
  *p = was | x;
  return was;
}
bool __tsan_atomic32_compare_exchange_weak(volatile uint32_t* p, uint32_t* was, uint32_t x, int,
                                           int) {
  access(const_cast<uint32_t*>(p), 4, Kind::kAtomic, HERE);
  if (*p != *was) {
    *was = *p;
    return false;
  }
  *p = x;
  return true;
}
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }

}  // extern "C"
