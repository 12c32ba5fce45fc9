// Arithmetic that rounds where torch rounds, and conversions to the formats of core.quant.
#pragma once
#include <cstdint>

#include "../../common/params.h"
#include "../primitives/numbers.cuh"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace permattn::permute {

// No product is fused with the sum behind it: ties would fall the other way.
#if defined(__CUDACC__)
PERMATTN_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
PERMATTN_DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
PERMATTN_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
PERMATTN_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
PERMATTN_DEVICE float float_from_half(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}
#else
inline float product(float a, float b) { return a * b; }
inline float sum(float a, float b) { return a + b; }
inline float quotient(float a, float b) { return a / b; }
inline float square_root(float x) { return __builtin_sqrtf(x); }
inline float float_from_half(uint32_t bits) {
  const auto narrow = static_cast<uint16_t>(bits);
  _Float16 x;
  __builtin_memcpy(&x, &narrow, 2);
  return static_cast<float>(x);
}
#endif
PERMATTN_DEVICE float difference(float a, float b) { return sum(a, -b); }

// Eight numbers of memory in 16 bytes, or 32 for float.
struct alignas(16) Words {
  uint32_t x[4];
};

template <Dtype kDtype>
struct Type;

template <>
struct Type<Dtype::kBFloat16> {
  using Storage = uint16_t;
  using Chunk = Words[1];
  static PERMATTN_DEVICE float to_float(Storage x) {
    return ptx::float_from_bits(static_cast<uint32_t>(x) << 16);
  }
  static PERMATTN_DEVICE void unpack(const Words (&from)[1], float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = ptx::float_from_bits(from[0].x[i] << 16);
      to[2 * i + 1] = ptx::float_from_bits(from[0].x[i] & 0xffff0000U);
    }
  }
  static PERMATTN_DEVICE void pack(const float (&from)[8], Words (&to)[1]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[0].x[i] = ptx::pack_bf16(from[2 * i], from[2 * i + 1]);
  }
};

template <>
struct Type<Dtype::kFloat16> {
  using Storage = uint16_t;
  using Chunk = Words[1];
  static PERMATTN_DEVICE float to_float(Storage x) { return float_from_half(x); }
  static PERMATTN_DEVICE void unpack(const Words (&from)[1], float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = float_from_half(from[0].x[i] & 0xffffU);
      to[2 * i + 1] = float_from_half(from[0].x[i] >> 16);
    }
  }
  static PERMATTN_DEVICE void pack(const float (&from)[8], Words (&to)[1]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[0].x[i] = ptx::pack_f16(from[2 * i], from[2 * i + 1]);
  }
};

template <>
struct Type<Dtype::kFloat32> {
  using Storage = float;
  using Chunk = Words[2];
  static PERMATTN_DEVICE float to_float(Storage x) { return x; }
  static PERMATTN_DEVICE void unpack(const Words (&from)[2], float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = ptx::float_from_bits(from[i / 4].x[i % 4]);
  }
  static PERMATTN_DEVICE void pack(const float (&from)[8], Words (&to)[2]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i / 4].x[i % 4] = ptx::bits_of(from[i]);
  }
};

PERMATTN_DEVICE uint32_t magnitude_bits(float x) { return ptx::bits_of(x) & 0x7fffffffU; }

// NaN stays what it is.
PERMATTN_DEVICE float clamped(float x, float high) {
  return x > high ? high : x < -high ? -high : x;
}

// The nearest integer in the low byte, ties to even, for |x| < 128; 0 for NaN. A sum with 1.5 *
// 2^23 has no digit behind the last one wanted.
PERMATTN_DEVICE uint32_t integer_byte(float x) {
  return x == x ? ptx::bits_of(sum(x, 12582912.0F)) & 0xffU : 0U;
}

// The byte of the nearest e4m3 number of |x| <= 448, ties to even.
PERMATTN_DEVICE uint32_t e4m3_byte(float x) {
  const uint32_t bits = magnitude_bits(x);
  const uint32_t sign = ptx::bits_of(x) >> 24 & 0x80U;
  if (bits > 0x7f800000U) return sign | 0x7fU;
  // Numbers below 2^-6 are multiples of 2^-9.
  if (bits < 0x3c800000U) {
    return sign | integer_byte(product(ptx::float_from_bits(bits), 512.0F));
  }
  // Three digits of the mantissa stay, 20 go.
  return sign | (((bits + 0x7ffffU + (bits >> 20 & 1U)) >> 20) - (120U << 3));
}

// Bytes of four numbers, the first one lowest.
PERMATTN_DEVICE uint32_t e4m3_word(float x0, float x1, float x2, float x3) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return ptx::pack_e4m3(x0, x1, x2, x3);
#else
  return e4m3_byte(x0) | e4m3_byte(x1) << 8 | e4m3_byte(x2) << 16 | e4m3_byte(x3) << 24;
#endif
}

PERMATTN_DEVICE uint32_t integer_word(float x0, float x1, float x2, float x3) {
  return integer_byte(x0) | integer_byte(x1) << 8 | integer_byte(x2) << 16 | integer_byte(x3) << 24;
}

// Four nibbles in 16 bits.
PERMATTN_DEVICE uint32_t nibble_half(float x0, float x1, float x2, float x3) {
  return (integer_byte(x0) & 15U) | (integer_byte(x1) & 15U) << 4 | (integer_byte(x2) & 15U) << 8 |
         (integer_byte(x3) & 15U) << 12;
}

}  // namespace permattn::permute
