// Words of CUDA C++ that kernels use.
#pragma once
#include "fibers.h"

#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 blockIdx, gridDim, blockDim;

namespace shim {
struct ThreadX {
  operator unsigned() const { return static_cast<unsigned>(block->current->thread); }
};
struct ThreadIdx {
  ThreadX x;
};
inline char* dynamic_shared() { return block->shared; }
}  // namespace shim
inline shim::ThreadIdx threadIdx;

// All threads that live.
inline void __syncthreads() {
  shim::Block& b = *shim::block;
  if (b.current->barriers++ == shim::options.left_out.barrier) return;
  if (++b.at_barrier < b.live) {
    shim::wait_for(&b.at_barrier);
    return;
  }
  b.at_barrier = 0;
  shim::observe::threads_met();
  for (auto& fiber : b.fibers) {
    if (fiber.state == shim::State::kWaiting && fiber.waits_for == &b.at_barrier) shim::wake(fiber);
  }
}
