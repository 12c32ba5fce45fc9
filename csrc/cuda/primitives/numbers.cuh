// Numbers: powers of two, conversions, and what lanes of a warp tell each other.
#pragma once
#include <cstdint>

#include "platform.cuh"

namespace permattn::ptx {

#if defined(__CUDACC__)

PERMATTN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

PERMATTN_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

PERMATTN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
PERMATTN_DEVICE float float_from_bits(uint32_t x) { return __uint_as_float(x); }

// Two numbers in a word, the first in its low half; rounded to nearest, ties to even.
PERMATTN_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

PERMATTN_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Four numbers in a word; beyond 448 they become 448. From sm_89 on.
PERMATTN_DEVICE uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(x1), "f"(x0));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(x3), "f"(x2));
  return static_cast<uint32_t>(high) << 16 | low;
}

PERMATTN_DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0U, x); }

// Largest of the four lanes that share rows of a fragment.
PERMATTN_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0U, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0U, x, 2));
}

#else

using shim::ballot;
using shim::bits_of;
using shim::exp2_approx;
using shim::float_from_bits;
using shim::log2_approx;
using shim::pack_bf16;
using shim::pack_e4m3;
using shim::pack_f16;
using shim::quad_max;

#endif

}  // namespace permattn::ptx
