// What a file of instantiations/ holds: one kernel and its launch. Only nvcc compiles them: the
// tests run what it makes of them.
#pragma once

#if defined(__CUDACC__)

#include "kernel.cuh"
#include "kernels.h"

namespace permattn::sm90 {

template <class T>
const char* launch_kernel(const LaunchArgs& args, int32_t blocks, void* stream) {
  return cuda::launch(attention_kernel<T>, blocks, kThreads, T::kSharedBytes, stream, args);
}

}  // namespace permattn::sm90

#define PERMATTN_SM90_INSTANTIATE(dtype, qk, pv, dim, block_n)                            \
  template const char* permattn::sm90::launch_kernel<permattn::sm90::Traits<              \
      permattn::Dtype::dtype, permattn::Format::qk, permattn::Format::pv, dim, block_n>>( \
      const permattn::sm90::LaunchArgs&, int32_t, void*);

#else

#define PERMATTN_SM90_INSTANTIATE(dtype, qk, pv, dim, block_n)

#endif
