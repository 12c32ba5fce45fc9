// Instruction sets, in ascending order: a machine that has one has all before it (x86).
#pragma once
#include <cstdint>

namespace permattn {

enum class Isa : int32_t {
  kPortable = 0,    // the compiler's baseline: SSE2, NEON
  kAvx2 = 1,        // AVX2 + FMA + F16C
  kAvx512 = 2,      // AVX-512 F, BW, DQ, VL
  kAvx512Vnni = 3,  // and AVX512_VNNI: vpdpbusd
  kAvx512Bf16 = 4,  // and AVX512_BF16: vdpbf16ps
  kAmxBf16 = 5,     // and AMX-TILE, AMX-BF16, AMX-INT8
};

constexpr int32_t kNumIsas = 6;

constexpr const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmxBf16:
      return "amx_bf16";
  }
  return "unknown";
}

}  // namespace permattn
