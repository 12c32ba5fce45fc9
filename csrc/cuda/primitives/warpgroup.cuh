// Warpgroups that do different things: barriers of their own, and registers moved between them.
#pragma once
#include <cstdint>

#include "platform.cuh"

namespace permattn::ptx {

constexpr int kWarpgroupThreads = 128;

// A barrier of kThreads threads; id 0 is __syncthreads.
template <int kId, int kThreads>
PERMATTN_DEVICE void named_barrier() {
  static_assert(kId > 0 && kId < 16 && kThreads % 32 == 0);
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// Every warp of a warpgroup gives registers back, or waits for them.
template <int kRegisters>
PERMATTN_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
PERMATTN_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// x, unknown to the compiler: what follows from it is worked out where it is used, and takes no
// registers across the loops around it.
PERMATTN_DEVICE int32_t here(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace permattn::ptx
