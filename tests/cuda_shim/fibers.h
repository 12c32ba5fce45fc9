// A fiber per CUDA thread of one block, run in a pseudo-random order. Threads wait at collectives
// and barriers only; what they do between is one step.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "observe.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

// The number, of those that every thread comes to, of what is passed over; -1: nothing is.
struct LeftOut {
  int32_t barrier = -1;       // __syncthreads
  int32_t warp_barrier = -1;  // __syncwarp
  int32_t wait = -1;          // cp.async.wait_group
};

struct Options {
  uint64_t seed = 1;      // of the schedule
  bool eager = false;     // cp.async lands when it is issued, not when it is waited for
  uint8_t poison = 0xFF;  // what shared memory holds at first: NaN as a float
  bool records = false;   // launches are remembered
  bool runs = true;       // and run
  LeftOut left_out;
  std::string refusal;  // where it is not empty, launches fail and say so
};
inline Options options;

// What a device answers to a launch, or null.
inline const char* refusal() { return options.refusal.empty() ? nullptr : options.refusal.c_str(); }

struct Copy {
  void* to;
  const void* from;
  int32_t valid;
};

enum class State : uint8_t { kReady, kWaiting, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  int32_t thread = 0, lane = 0, warp = 0;
  State state = State::kReady;
  const void* waits_for = nullptr;
  void* argument = nullptr;  // of the collective it waits at
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  int32_t barriers = 0, warp_barriers = 0, waits = 0;  // so far
  void* fake_stack = nullptr;
};

struct Warp {
  uint32_t wanted = 0, arrived = 0;
  const void* operation = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int32_t> ready;
  std::function<void()> body;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  int32_t live = 0, at_barrier = 0;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  uint64_t random = 1;
  std::string fault;
};
inline Block* block = nullptr;

struct Statistics {
  int64_t matrix_loads = 0, bank_conflicts = 0;
};
inline Statistics statistics;

constexpr size_t kStackBytes = 128 << 10;

extern "C" void permattn_shim_switch(void** save, void* load);
asm(R"(
.text
.weak permattn_shim_switch
.type permattn_shim_switch,@function
permattn_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void to_scheduler() {
  Fiber* fiber = block->current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber->state == State::kDone ? nullptr : &fiber->fake_stack,
                                 block->scheduler_stack, block->scheduler_stack_size);
#endif
  permattn_shim_switch(&fiber->stack_pointer, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#endif
}

// Ends the block: the launch throws what is said here. Never returns.
[[noreturn]] inline void fail(const std::string& what) {
  const Fiber* fiber = block->current;
  block->fault = what + (fiber == nullptr ? "" : " (thread " + std::to_string(fiber->thread) + ")");
  while (true) to_scheduler();
}

inline void wait_for(const void* what) {
  block->current->state = State::kWaiting;
  block->current->waits_for = what;
  to_scheduler();
}

inline void wake(Fiber& fiber) {
  fiber.state = State::kReady;
  fiber.waits_for = nullptr;
  block->ready.push_back(fiber.thread);
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
  block->body();
  Fiber* fiber = block->current;
  fiber->groups.push_back(fiber->open);
  for (const auto& group : fiber->groups) {
    for (const Copy& copy : group) {
      if (copy.valid > 0) fail("a thread ends with cp.async under way");
    }
  }
  fiber->state = State::kDone;
  --block->live;
  to_scheduler();
}

inline void start_fiber(Fiber& fiber, int32_t thread, char* stack) {
  fiber.thread = thread;
  fiber.lane = thread % 32;
  fiber.warp = thread / 32;
  fiber.stack = stack;
  // As after a call: the stack pointer is 8 below a multiple of 16.
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

inline uint64_t next_random() {
  block->random = block->random * 6364136223846793005ULL + 1442695040888963407ULL;
  return block->random >> 33;
}

// Until every thread has ended, or something is wrong.
inline void run_fibers() {
  Block& b = *block;
  while (b.live > 0 && b.fault.empty()) {
    if (b.ready.empty()) {
      b.fault = "deadlock: threads wait at different barriers or collectives";
      return;
    }
    const size_t pick = options.seed == 0 ? b.ready.size() - 1 : next_random() % b.ready.size();
    const int32_t thread = b.ready[pick];
    b.ready[pick] = b.ready.back();
    b.ready.pop_back();
    b.current = &b.fibers[thread];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, b.current->stack, kStackBytes);
#endif
    observe::goes_on(thread);
    permattn_shim_switch(&b.scheduler, b.current->stack_pointer);
    observe::goes_on(-1);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    b.current = nullptr;
  }
}

}  // namespace shim
