// What device code is written against: CUDA, or the tests' stand-in for it on a CPU.
#pragma once
#include "../../common/host_device.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define PERMATTN_DEVICE __device__ __forceinline__
#define PERMATTN_GLOBAL __global__
#define PERMATTN_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]

#else

// Found by the include path of the tests; shipped libraries never compile this branch.
#include "cuda_shim.h"

#define PERMATTN_DEVICE inline
#define PERMATTN_GLOBAL
#define PERMATTN_DYNAMIC_SHARED(name) char* const name = shim::dynamic_shared()

#endif
