// Regions: the compiler's baseline (SSE2, NEON), four lanes.
#include <cmath>
#include <type_traits>

#include "../../common/token_rule.h"
#include "../kernels.h"
#include "../regions.h"

#define PERMATTN_WIDTH 4
#define PERMATTN_CHUNK 96

namespace permattn::cpu::regions_portable {
#include "../kernel/region_float.inl"
}  // namespace permattn::cpu::regions_portable

namespace permattn::cpu {
RegionKernels portable_region_kernels(Dtype dtype) {
  return regions_portable::float_region_kernels(dtype);
}
}  // namespace permattn::cpu
