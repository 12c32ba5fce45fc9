// Launches of the kernels of one pair of formats: what an instantiation file turns into code.
#pragma once
#include "dispatch.h"
#include "kernel.cuh"

namespace permattn::sm80 {

template <Dtype kDtype, Format kQk, Format kPv>
const char* launch_formats(const AttentionArgs& args, const cuda::Config& config, void* stream) {
  return visit_dims<kDtype, kQk, kPv>(config, [&]<int kDim, int kRows>(
                                                  Kernel<kDtype, kQk, kPv, kDim, kRows>) {
    using T = Traits<kDtype, kQk, kPv, kDim, kRows>;
    const int64_t blocks = static_cast<int64_t>(args.batch) * args.q_heads * args.num_tiles;
    return cuda::launch(attention_kernel<T>, blocks, T::kThreads, T::kSharedBytes, stream, args);
  });
}

}  // namespace permattn::sm80

#define PERMATTN_INSTANTIATE_SM80(dtype, qk, pv)                                                   \
  template const char* permattn::sm80::launch_formats<permattn::Dtype::dtype,                      \
                                                      permattn::Format::qk, permattn::Format::pv>( \
      const permattn::cuda::AttentionArgs&, const permattn::cuda::Config&, void*);
