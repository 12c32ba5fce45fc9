// Regions: AVX2 + FMA + F16C with fp32 arithmetic.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <type_traits>

#include "../../common/token_rule.h"
#include "../kernels.h"
#include "../regions.h"

#define PERMATTN_WIDTH 8
#define PERMATTN_CHUNK 96

#include "target_avx2.h"
namespace permattn::cpu::regions_avx2 {
#include "../kernel/region_float.inl"
}  // namespace permattn::cpu::regions_avx2
#include "target_end.h"

namespace permattn::cpu {
RegionKernels avx2_region_kernels(Dtype dtype) { return regions_avx2::float_region_kernels(dtype); }
}  // namespace permattn::cpu
#endif
