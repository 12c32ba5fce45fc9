// Regions: AVX-512 with bf16 dot products in the forward; the rest runs on regions_avx512.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <type_traits>

#include "../../common/token_rule.h"
#include "../kernels.h"
#include "../regions.h"

#define PERMATTN_WIDTH 16
#define PERMATTN_CHUNK 96

#include "target_avx512_bf16.h"
namespace permattn::cpu::regions_avx512_bf16 {
#include "../kernel/base.inl"
#include "../kernel/float_math.inl"
#include "../kernel/bf16_math.inl"
#include "../kernel/softmax.inl"
#include "../kernel/region_map.inl"
#include "../kernel/region_bf16.inl"
#include "../kernel/region_gemm.inl"
#include "../kernel/region_keys.inl"
#include "../kernel/region_forward.inl"
#include "../kernel/region_kernels.inl"
}  // namespace permattn::cpu::regions_avx512_bf16
#include "target_end.h"

namespace permattn::cpu {
RegionKernels avx512_bf16_region_kernels(Dtype dtype) {
  RegionKernels kernels{};
  if (dtype != Dtype::kBFloat16) return kernels;
  regions_avx512_bf16::add_region_forwards<regions_avx512_bf16::Bf16Math<1>>(kernels);
  return kernels;
}
}  // namespace permattn::cpu
#endif
