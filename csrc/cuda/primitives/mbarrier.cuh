// Barriers in shared memory that threads and bulk copies arrive at (sm_90 on). Waits name the
// parity of the phase that they wait for: a fresh barrier has passed parity 1.
#pragma once
#include "memory.cuh"

namespace permattn::ptx {

PERMATTN_DEVICE void mbarrier_init(uint64_t* barrier, int32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// What was initialised is seen by bulk copies and the other threads; a barrier follows.
PERMATTN_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

PERMATTN_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// The phase also waits for bytes of bulk copies. The caller arrives afterwards.
PERMATTN_DEVICE void mbarrier_expect(uint64_t* barrier, int32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Whether the phase is over, without waiting for it.
PERMATTN_DEVICE bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

PERMATTN_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  // Each try sleeps for a while.
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// What this thread wrote or waited for is seen by wgmma and bulk copies that come after it.
PERMATTN_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace permattn::ptx
