// What device code is written against: CUDA, or the tests' stand-in for it on a CPU.
#pragma once
#include <cstdint>

#include "../../common/host_device.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define PERMATTN_DEVICE __device__ __forceinline__
#define PERMATTN_GLOBAL __global__
#define PERMATTN_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]

#else

// Found by the include path of the tests; shipped libraries never compile this branch.
#include "cuda_shim.h"

#define PERMATTN_DEVICE SHIM_DEVICE
#define PERMATTN_GLOBAL
#define PERMATTN_DYNAMIC_SHARED(name) char* const name = shim::dynamic_shared()

#endif

namespace permattn::cuda {

// Runs kernel(args) on `blocks` blocks. Null, or why nothing was launched; no error stays behind
// for a later call to find. `stream` is a cudaStream_t.
template <class Args>
const char* launch(void (*kernel)(Args), int64_t blocks, int32_t threads, int64_t shared_bytes,
                   void* stream, const Args& args) {
  if (blocks < 1 || blocks > INT32_MAX) return "a launch wants 1 to 2^31 - 1 blocks";
#if defined(__CUDACC__)
  // More shared memory than this a kernel must ask for.
  constexpr int64_t kUnasked = 48 * 1024;
  const auto* address = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kUnasked) {
    error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    void* parameters[] = {const_cast<Args*>(&args)};
    error = cudaLaunchKernel(address, dim3(static_cast<unsigned>(blocks)),
                             dim3(static_cast<unsigned>(threads)), parameters,
                             static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
#else
  static_cast<void>(stream);
  return shim::try_launch(kernel, static_cast<unsigned>(blocks), threads,
                          static_cast<size_t>(shared_bytes), args);
#endif
}

}  // namespace permattn::cuda
