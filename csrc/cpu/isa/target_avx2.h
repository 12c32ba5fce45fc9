// Opens a region compiled for AVX2, FMA and F16C; target_end.h closes it. By pragma and not by a
// compiler flag, so that no inline function of the standard library is compiled for it and then
// chosen by the linker for a machine that lacks it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
