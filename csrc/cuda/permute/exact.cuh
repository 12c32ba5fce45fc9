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
// The low bytes of four words, side by side.
PERMATTN_DEVICE uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
#else
inline uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return (a & 0xffU) | (b & 0xffU) << 8 | (c & 0xffU) << 16 | d << 24;
}
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

// A number's nearest integer in the low digits of a word, ties to even, for |x| < 2^22: 1.5 * 2^23
// has no digit behind the last one wanted. NaN becomes anything.
constexpr uint32_t kIntegerZero = 0x4b400000U;
PERMATTN_DEVICE uint32_t integer_digits(float x) { return ptx::bits_of(sum(x, 12582912.0F)); }

// The byte of the nearest e4m3 number of |x| < 464, ties to even.
PERMATTN_DEVICE uint32_t e4m3_byte(float x) {
  const uint32_t bits = magnitude_bits(x);
  const uint32_t sign = ptx::bits_of(x) >> 24 & 0x80U;
  if (bits > 0x7f800000U) return sign | 0x7fU;
  // Numbers below 2^-6 are multiples of 2^-9.
  if (bits < 0x3c800000U) {
    return sign | (integer_digits(product(ptx::float_from_bits(bits), 512.0F)) - kIntegerZero);
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
  return low_bytes(integer_digits(x0), integer_digits(x1), integer_digits(x2), integer_digits(x3));
}

// Four nibbles in 16 bits. Summed up as numbers from -8 to 7, of which each one borrows from the
// next; eight more of each, and none does.
PERMATTN_DEVICE uint32_t nibble_half(float x0, float x1, float x2, float x3) {
  const uint32_t all = integer_digits(x0) + 16U * integer_digits(x1) + 256U * integer_digits(x2) +
                       4096U * integer_digits(x3);
  return ((all + 0x8888U) ^ 0x8888U) & 0xffffU;
}

}  // namespace permattn::permute
