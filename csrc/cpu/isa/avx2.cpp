// AVX2 + FMA + F16C with fp32 arithmetic.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#include "../../common/token_rule.h"
#include "../cpu.h"
#include "../kernels.h"

#define PERMATTN_WIDTH 8
#define PERMATTN_CHUNK 96

#include "target_avx2.h"
namespace permattn::cpu::avx2 {
#include "../kernel/float_kernels.inl"
}  // namespace permattn::cpu::avx2
#include "target_end.h"

namespace permattn::cpu {
Kernels avx2_kernels(Dtype dtype) { return avx2::float_kernels(dtype); }
}  // namespace permattn::cpu
#endif
