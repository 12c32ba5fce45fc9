// The kernels that there are, one in each file of instantiations/.
#pragma once
#include "traits.cuh"

// X(dtype, qk, pv, dim, block_n). Where P V is quantised, one kernel writes every dtype.
#define PERMATTN_SM90_DTYPES(X, qk, dim, block_n) \
  X(kBFloat16, qk, kNone, dim, block_n)           \
  X(kFloat16, qk, kNone, dim, block_n)
#define PERMATTN_SM90_KERNELS(X)           \
  PERMATTN_SM90_DTYPES(X, kNone, 64, 64)   \
  PERMATTN_SM90_DTYPES(X, kNone, 64, 128)  \
  PERMATTN_SM90_DTYPES(X, kNone, 96, 64)   \
  PERMATTN_SM90_DTYPES(X, kNone, 96, 128)  \
  PERMATTN_SM90_DTYPES(X, kNone, 128, 64)  \
  PERMATTN_SM90_DTYPES(X, kNone, 128, 128) \
  PERMATTN_SM90_DTYPES(X, kNone, 256, 64)  \
  PERMATTN_SM90_DTYPES(X, kInt8, 64, 64)   \
  PERMATTN_SM90_DTYPES(X, kInt8, 96, 64)   \
  PERMATTN_SM90_DTYPES(X, kInt8, 128, 64)  \
  X(kFloat32, kInt8, kFp8, 64, 64)         \
  X(kFloat32, kInt8, kFp8, 96, 64)         \
  X(kFloat32, kInt8, kFp8, 128, 64)        \
  X(kFloat32, kInt8, kInt8, 64, 64)        \
  X(kFloat32, kInt8, kInt8, 96, 64)        \
  X(kFloat32, kInt8, kInt8, 128, 64)

namespace permattn::sm90 {

// Null, or why nothing was launched.
template <class T>
const char* launch_kernel(const LaunchArgs& args, int32_t blocks, void* stream);

}  // namespace permattn::sm90
