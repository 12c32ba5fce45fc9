// The compiler's baseline (SSE2, NEON): four lanes.
#include <cmath>

#include "../../common/token_rule.h"
#include "../kernels.h"

#define PERMATTN_WIDTH 4
#define PERMATTN_CHUNK 96

namespace permattn::cpu::portable {
#include "../kernel/base.inl"
//
#include "../kernel/float_math.inl"
//
#include "../kernel/forward.inl"
}  // namespace permattn::cpu::portable

namespace permattn::cpu {
Kernels portable_kernels(Dtype dtype) { return portable::float_kernels(dtype); }
}  // namespace permattn::cpu
