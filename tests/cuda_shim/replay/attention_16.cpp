// Attention by mma.sync, numbers of 16 bits: Q in registers and Q read again, tiles of 64 queries
// and of 128, the widest heads; and what ends a plan of several launches.
#include "cuda/sm80/finish.cu"
#include "cuda/sm80/kernel.cuh"
#include "registry.h"

namespace replay {

using permattn::Dtype;
using permattn::Format;
template <Dtype kDtype, int kDim, int kRows>
constexpr auto kKernel = &permattn::sm80::attention_kernel<
    permattn::sm80::Traits<kDtype, Format::kNone, Format::kNone, kDim, kRows>>;

void add_attention_16(Registry& registry) {
  registry.add(kKernel<Dtype::kBFloat16, 64, 64>);
  registry.add(kKernel<Dtype::kBFloat16, 64, 128>);
  registry.add(kKernel<Dtype::kBFloat16, 96, 128>);
  registry.add(kKernel<Dtype::kFloat16, 128, 64>);
  registry.add(kKernel<Dtype::kBFloat16, 256, 64>);
  registry.add(&permattn::cuda::finish_kernel);
}

}  // namespace replay
