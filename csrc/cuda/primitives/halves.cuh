// Numbers of a word of two, as float32.
#pragma once
#include "numbers.cuh"

namespace permattn::ptx {

PERMATTN_DEVICE float low_bf16(uint32_t word) { return float_from_bits(word << 16); }
PERMATTN_DEVICE float high_bf16(uint32_t word) { return float_from_bits(word & 0xFFFF0000U); }

PERMATTN_DEVICE float low_f16(uint32_t word) {
  float x;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}"
      : "=f"(x)
      : "r"(word));
  return x;
}
PERMATTN_DEVICE float high_f16(uint32_t word) {
  float x;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, high;\n}"
      : "=f"(x)
      : "r"(word));
  return x;
}

}  // namespace permattn::ptx
