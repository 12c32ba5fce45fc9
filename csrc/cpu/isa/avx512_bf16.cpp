// AVX-512 with bf16 dot products (Cooper Lake, Zen 4 and later); other dtypes run on avx512.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#include "../../common/token_rule.h"
#include "../cpu.h"
#include "../kernels.h"

#define PERMATTN_WIDTH 16
#define PERMATTN_CHUNK 96

#include "target_avx512_bf16.h"
namespace permattn::cpu::avx512_bf16 {
#include "../kernel/base.inl"
#include "../kernel/bf16_math.inl"
#include "../kernel/int_math.inl"
#include "../kernel/vnni_math.inl"
#include "../kernel/softmax.inl"
#include "../kernel/forward.inl"
#include "../kernel/probe.inl"
#include "../kernel/quantised.inl"
}  // namespace permattn::cpu::avx512_bf16
#include "target_end.h"

namespace permattn::cpu {
Kernels avx512_bf16_kernels(Dtype dtype) {
  using Math = avx512_bf16::Bf16Math<1>;
  using Products = avx512_bf16::VectorProducts<avx512_bf16::VnniBytes>;
  Kernels kernels{};
  avx512_bf16::add_fp8_kernels<Products, Math>(kernels);
  if (dtype != Dtype::kBFloat16) return kernels;
  avx512_bf16::add_plain_kernels<Products, Math>(kernels);
  kernels.forward = avx512_bf16::forward_tile<Math>;
  kernels.forward_rest = avx512_bf16::forward_rest<Math>;
  kernels.forward_scratch = avx512_bf16::forward_scratch<Math>;
  kernels.probe_total = avx512_bf16::probe_total<Math>;
  kernels.probe_mass = avx512_bf16::probe_mass<Math>;
  kernels.probe_scratch = avx512_bf16::probe_scratch<Math>;
  return kernels;
}
}  // namespace permattn::cpu
#endif
