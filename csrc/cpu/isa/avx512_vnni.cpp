// AVX-512 with products of bytes (Cascade Lake, Zen 4 and later); all but quantised attention runs
// on avx512.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#include "../../common/token_rule.h"
#include "../cpu.h"
#include "../kernels.h"

#define PERMATTN_WIDTH 16
#define PERMATTN_CHUNK 96

#include "target_avx512_vnni.h"
namespace permattn::cpu::avx512_vnni {
#include "../kernel/base.inl"
#include "../kernel/float_math.inl"
#include "../kernel/int_math.inl"
#include "../kernel/vnni_math.inl"
#include "../kernel/softmax.inl"
#include "../kernel/quantised.inl"

template <class Type>
Kernels kernels_of() {
  using Products = VectorProducts<VnniBytes>;
  Kernels kernels{};
  add_integer_kernels<Products>(kernels);
  add_plain_kernels<Products, FloatMath<Type>>(kernels);
  add_fp8_kernels<Products, FloatMath<BFloat16>>(kernels);
  return kernels;
}
}  // namespace permattn::cpu::avx512_vnni
#include "target_end.h"

namespace permattn::cpu {
Kernels avx512_vnni_kernels(Dtype dtype) {
  using namespace avx512_vnni;
  switch (dtype) {
    case Dtype::kFloat32:
      return kernels_of<Float32>();
    case Dtype::kBFloat16:
      return kernels_of<BFloat16>();
    case Dtype::kFloat16:
      return kernels_of<Float16>();
  }
  return {};
}
}  // namespace permattn::cpu
#endif
