// Opens a region compiled for AVX-512 with bf16 dot products; target_end.h closes it. By pragma and
// not by a compiler flag, so that no inline function of the standard library is compiled for it and
// then chosen by the linker for a machine that lacks it.
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((target(                                                                    \
        "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,prefer-vector-width=512")
#endif
