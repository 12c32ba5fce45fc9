// One matrix instruction by formats, and how its sums are read. Every step takes 32 bytes of a row.
#pragma once
#include "../primitives/mma.cuh"
#include "../primitives/numbers.cuh"
#include "shape.h"

namespace permattn::sm80 {

// Sums of integers below 2^22 start from the bits of 1.5 * 2^23: as a float, a sum is then that
// number plus the sum, and no conversion is needed. 127 * 127 * 256 and 255 * 127 * 64 are below.
constexpr uint32_t kIntegerZero = 0x4B400000U;
constexpr float kIntegerBias = 12582912.0F;

PERMATTN_DEVICE void clear(float (&c)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = 0.0F;
}
PERMATTN_DEVICE void clear(int32_t (&c)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = static_cast<int32_t>(kIntegerZero);
}

PERMATTN_DEVICE float value_of(float sum) { return sum; }
PERMATTN_DEVICE float value_of(int32_t sum) {
  return ptx::float_from_bits(static_cast<uint32_t>(sum)) - kIntegerBias;
}

// Q K^T: c += a b.
template <Format kFormat, Dtype kDtype>
struct ScoreProduct {
  using Sum = int32_t;
  PERMATTN_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
    if constexpr (kFormat == Format::kInt8) {
      ptx::mma_s8(c, a, b);
    } else {
      ptx::mma_s4(c, a, b);
    }
  }
};

template <Dtype kDtype>
struct ScoreProduct<Format::kNone, kDtype> {
  using Sum = float;
  PERMATTN_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
    if constexpr (kDtype == Dtype::kBFloat16) {
      ptx::mma_bf16(c, a, b);
    } else {
      ptx::mma_f16(c, a, b);
    }
  }
};

// P V of small numbers: c += a b, a being probabilities.
template <Format kFormat>
struct ValueProduct {
  using Sum = int32_t;
  static constexpr uint32_t kOnes = kFormat == Format::kInt8 ? 0x01010101U : 0x11111111U;
  PERMATTN_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
    if constexpr (kFormat == Format::kInt8) {
      ptx::mma_u8s8(c, a, b);
    } else {
      ptx::mma_u4s4(c, a, b);
    }
  }
};

template <>
struct ValueProduct<Format::kFp8> {
  using Sum = float;
  static constexpr uint32_t kOnes = 0x38383838U;
  PERMATTN_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
    ptx::mma_e4m3(c, a, b);
  }
};

// P in [0, P_HIGH] as four or eight numbers of the A operand, which stand in fragment order.
PERMATTN_DEVICE uint32_t steps(float p) { return ptx::bits_of(p + kIntegerBias); }

PERMATTN_DEVICE uint32_t pack_bytes(float p0, float p1, float p2, float p3) {
  const uint32_t low = (steps(p0) & 0xFFU) | (steps(p1) & 0xFFU) << 8;
  const uint32_t high = (steps(p2) & 0xFFU) | (steps(p3) & 0xFFU) << 8;
  return low | high << 16;
}

// The biases of eight sums of four bits add up to a number that does not depend on them.
PERMATTN_DEVICE uint32_t pack_nibbles(const float (&p)[8]) {
  uint32_t packed = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) packed = packed * 16 + steps(p[i]);
  return packed - kIntegerZero * 0x11111111U;
}

}  // namespace permattn::sm80
