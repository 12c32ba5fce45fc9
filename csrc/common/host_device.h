// Functions that nvcc compiles for both sides, and every other compiler for its own.
#pragma once

#if defined(__CUDACC__)
#define PERMATTN_HD __host__ __device__
#else
#define PERMATTN_HD
#endif
