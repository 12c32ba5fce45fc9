// Copies into shared memory, and matrices out of it.
#pragma once
#include <cstdint>

#include "platform.cuh"

namespace permattn::ptx {

#if defined(__CUDACC__)

PERMATTN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies the first `valid_bytes` of 16, and zeros behind them. Both addresses are multiples of 16.
PERMATTN_DEVICE void cp_async_16(void* to, const void* from, int32_t valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid_bytes)
               : "memory");
}

PERMATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
PERMATTN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8 i + r names row r of matrix i.
template <bool kTransposed>
PERMATTN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

#else

using shim::cp_async_16;
using shim::cp_async_commit;
using shim::cp_async_wait;
using shim::ldmatrix_x4;

#endif

}  // namespace permattn::ptx
