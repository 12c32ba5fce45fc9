// AVX-512 with fp32 arithmetic.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#include "../../common/token_rule.h"
#include "../cpu.h"
#include "../kernels.h"

#define PERMATTN_WIDTH 16
#define PERMATTN_CHUNK 96

#include "target_avx512.h"
namespace permattn::cpu::avx512 {
#include "../kernel/float_kernels.inl"
}  // namespace permattn::cpu::avx512
#include "target_end.h"

namespace permattn::cpu {
Kernels avx512_kernels(Dtype dtype) { return avx512::float_kernels(dtype); }
}  // namespace permattn::cpu
#endif
