// Regions: AVX-512 with fp32 arithmetic.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <type_traits>

#include "../../common/token_rule.h"
#include "../kernels.h"
#include "../regions.h"

#define PERMATTN_WIDTH 16
#define PERMATTN_CHUNK 96

#include "target_avx512.h"
namespace permattn::cpu::regions_avx512 {
#include "../kernel/region_float.inl"
}  // namespace permattn::cpu::regions_avx512
#include "target_end.h"

namespace permattn::cpu {
RegionKernels avx512_region_kernels(Dtype dtype) {
  return regions_avx512::float_region_kernels(dtype);
}
}  // namespace permattn::cpu
#endif
