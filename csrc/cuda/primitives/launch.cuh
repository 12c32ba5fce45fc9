// The one way to launch: a kernel of one parameter, a row of blocks.
#pragma once
#include <cstdint>

#include "platform.cuh"

namespace permattn::cuda {

// Why nothing was launched, or null. `stream` is a cudaStream_t. No error stays behind for the next
// call of somebody else to find.
template <class Args>
const char* launch(void (*kernel)(Args), int64_t blocks, int32_t threads, int64_t shared_bytes,
                   void* stream, const Args& args) {
  if (blocks < 1 || blocks > INT32_MAX) return "a launch wants 1 to 2^31 - 1 blocks";
#if defined(__CUDACC__)
  const auto* address = reinterpret_cast<const void*>(kernel);
  // More than this a kernel must ask for.
  constexpr int64_t kUnasked = 48 * 1024;
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
  shim::launch(static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes),
               [&] { kernel(args); });
  return nullptr;
#endif
}

}  // namespace permattn::cuda
