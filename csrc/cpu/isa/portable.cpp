// The compiler's baseline (SSE2, NEON): four lanes.
#include <cmath>

#include "../../common/token_rule.h"
#include "../cpu.h"
#include "../kernels.h"

#define PERMATTN_WIDTH 4
#define PERMATTN_CHUNK 96

namespace permattn::cpu::portable {
#include "../kernel/float_kernels.inl"
}  // namespace permattn::cpu::portable

namespace permattn::cpu {
Kernels portable_kernels(Dtype dtype) { return portable::float_kernels(dtype); }
}  // namespace permattn::cpu
