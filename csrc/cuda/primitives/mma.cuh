// Products of a warp: c += a b, of 16 rows and 8 columns. Fragments are those of the PTX manual.
#pragma once
#include <cstdint>

#include "platform.cuh"

namespace permattn::ptx {

#if defined(__CUDACC__)

#define PERMATTN_MMA(name, type, constraint, instruction)                                        \
  PERMATTN_DEVICE void name(type(&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {       \
    asm volatile(                                                                                \
        "mma.sync.aligned." instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+" constraint(c[0]), "+" constraint(c[1]), "+" constraint(c[2]), "+" constraint(c[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \
  }

PERMATTN_MMA(mma_bf16, float, "f", "m16n8k16.row.col.f32.bf16.bf16.f32")
PERMATTN_MMA(mma_f16, float, "f", "m16n8k16.row.col.f32.f16.f16.f32")
PERMATTN_MMA(mma_s8, int32_t, "r", "m16n8k32.row.col.s32.s8.s8.s32")
PERMATTN_MMA(mma_u8s8, int32_t, "r", "m16n8k32.row.col.s32.u8.s8.s32")
// Products of four bits are emulated from sm_90 on: slower than those of bytes.
PERMATTN_MMA(mma_s4, int32_t, "r", "m16n8k64.row.col.s32.s4.s4.s32")
PERMATTN_MMA(mma_u4s4, int32_t, "r", "m16n8k64.row.col.s32.u4.s4.s32")
// From sm_89 on.
PERMATTN_MMA(mma_e4m3, float, "f", "m16n8k32.row.col.f32.e4m3.e4m3.f32")

#undef PERMATTN_MMA

#else

using shim::mma_bf16;
using shim::mma_e4m3;
using shim::mma_f16;
using shim::mma_s4;
using shim::mma_s8;
using shim::mma_u4s4;
using shim::mma_u8s8;

#endif

}  // namespace permattn::ptx
