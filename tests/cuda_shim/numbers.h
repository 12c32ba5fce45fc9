// Conversions as the instructions make them; powers of two exactly.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace shim {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }

inline uint32_t bf16_bits(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1U)) >> 16;
}
inline uint32_t f16_bits(float x) {
  const auto half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline uint32_t pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }

// The bits of the e4m3 number nearest to x, ties to even, 448 at most.
inline uint32_t e4m3_bits(float x) {
  if (std::isnan(x)) return 0x7F;
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  const float size = std::min(std::fabs(x), 448.0F);
  int exponent = -6;
  if (size > 0) std::frexp(size, &exponent);
  exponent = std::max(exponent - 1, -6);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  // Eight steps of a subnormal number are the first normal one, as sixteen are of the next
  // exponent.
  return sign + static_cast<uint32_t>(steps + (exponent + 6) * 8);
}
inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  return e4m3_bits(x0) | e4m3_bits(x1) << 8 | e4m3_bits(x2) << 16 | e4m3_bits(x3) << 24;
}
inline float from_e4m3(uint32_t bits) {
  const uint32_t size = bits & 0x7F;
  if (size == 0x7F) return std::nanf("");
  const float x =
      size < 8 ? std::ldexp(static_cast<float>(size), -9)
               : std::ldexp(static_cast<float>(8 + size % 8), static_cast<int>(size / 8) - 10);
  return (bits & 0x80) != 0 ? -x : x;
}

}  // namespace shim
