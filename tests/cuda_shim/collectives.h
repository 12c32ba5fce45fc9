// What lanes of a warp do together: they wait for each other, and the last one does it for all.
#pragma once
#include "builtins.h"

namespace shim {

template <class A>
void collective(uint32_t mask, A& argument, void (*apply)(A** lanes)) {
  Fiber& fiber = *block->current;
  Warp& warp = block->warps[fiber.warp];
  const auto* operation = reinterpret_cast<const void*>(apply);
  if ((mask >> fiber.lane & 1U) == 0) fail("a lane takes part in a collective without itself");
  if (warp.arrived == 0) {
    warp.wanted = mask;
    warp.operation = operation;
  } else if (warp.operation != operation || warp.wanted != mask) {
    fail("lanes of a warp meet in different collectives");
  }
  fiber.argument = &argument;
  warp.arrived |= 1U << fiber.lane;
  if (warp.arrived != warp.wanted) {
    wait_for(&warp);
    return;
  }
  A* lanes[32] = {};
  Fiber* first = &block->fibers[fiber.warp * 32];
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1U) != 0) lanes[i] = static_cast<A*>(first[i].argument);
  }
  observe::goes_on(-1);
  apply(lanes);
  observe::goes_on(fiber.thread);
  warp.arrived = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1U) != 0 && i != fiber.lane) wake(first[i]);
  }
}

template <class T>
struct Exchange {
  T value;
  int32_t from;
  T result;
};

template <class T>
T exchange(T value, int32_t from) {
  Exchange<T> mine{value, from, value};
  collective<Exchange<T>>(~0U, mine, [](Exchange<T>** lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[lanes[i]->from]->value;
  });
  return mine.result;
}

inline float quad_max(float x) {
  const int32_t lane = block->current->lane;
  x = fmaxf(x, exchange(x, lane ^ 1));
  return fmaxf(x, exchange(x, lane ^ 2));
}

inline uint32_t ballot(bool x) {
  struct Vote {
    bool mine;
    uint32_t all;
  } vote{x, 0};
  collective<Vote>(~0U, vote, [](Vote** lanes) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= (lanes[i]->mine ? 1U : 0U) << i;
    for (int i = 0; i < 32; ++i) lanes[i]->all = all;
  });
  return vote.all;
}

}  // namespace shim

inline void __syncwarp() {
  shim::Fiber& fiber = *shim::block->current;
  if (fiber.warp_barriers++ == shim::options.left_out.warp_barrier) return;
  struct Meeting {
    int32_t warp;
  } meeting{fiber.warp};
  shim::collective<Meeting>(~0U, meeting,
                            [](Meeting** lanes) { shim::observe::lanes_met(lanes[0]->warp); });
}
