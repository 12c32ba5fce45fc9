// Kernels of bare instructions, for a device, for the simulator, and (as C++) for the stand-in.
#include "warp.cuh"

using namespace conformance;
using Words = const uint32_t*;

#define PRODUCTS(name, Number)                                                                    \
  extern "C" PERMATTN_GLOBAL void name(Words in, uint32_t* out) {                                 \
    products<Number>(in, out, [](Number(&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
      ptx::name(c, a, b);                                                                         \
    });                                                                                           \
  }

PRODUCTS(mma_bf16, float)
PRODUCTS(mma_f16, float)
PRODUCTS(mma_s8, int32_t)
PRODUCTS(mma_u8s8, int32_t)
PRODUCTS(mma_s4, int32_t)
PRODUCTS(mma_u4s4, int32_t)

extern "C" PERMATTN_GLOBAL void ldmatrix(Words in, uint32_t* out) { load_matrices<false>(in, out); }
extern "C" PERMATTN_GLOBAL void ldmatrix_trans(Words in, uint32_t* out) {
  load_matrices<true>(in, out);
}
extern "C" PERMATTN_GLOBAL void cp_async_zeros(Words in, uint32_t* out) {
  copy_with_zeros(in, out);
}

extern "C" PERMATTN_GLOBAL void exp2_approx(Words in, uint32_t* out) {
  numbers(in, out, [](float x) { return ptx::exp2_approx(x); });
}
extern "C" PERMATTN_GLOBAL void log2_approx(Words in, uint32_t* out) {
  numbers(in, out, [](float x) { return ptx::log2_approx(x); });
}
extern "C" PERMATTN_GLOBAL void pack_bf16(Words in, uint32_t* out) {
  packed(in, out,
         [](const float (&x)[4], int i) { return ptx::pack_bf16(x[2 * i], x[2 * i + 1]); });
}
extern "C" PERMATTN_GLOBAL void pack_f16(Words in, uint32_t* out) {
  packed(in, out, [](const float (&x)[4], int i) { return ptx::pack_f16(x[2 * i], x[2 * i + 1]); });
}

#if defined(__CUDACC__)
// The kernels divide; the stand-in for CUDA has C++'s own division in its place.
extern "C" __global__ void rcp_approx(Words in, uint32_t* out) {
  numbers(in, out, [](float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  });
}
#endif

// From sm_89 on.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
PRODUCTS(mma_e4m3, float)
extern "C" PERMATTN_GLOBAL void pack_e4m3(Words in, uint32_t* out) {
  packed(in, out, [](const float (&x)[4], int) { return ptx::pack_e4m3(x[0], x[1], x[2], x[3]); });
}
#endif
