// Attention by mma.sync, numbers of 8 and 4 bits.
#include "cuda/sm80/kernel.cuh"
#include "registry.h"

namespace replay {

using permattn::Dtype;
using permattn::Format;
template <Dtype kDtype, Format kQk, Format kPv, int kRows>
constexpr auto kKernel =
    &permattn::sm80::attention_kernel<permattn::sm80::Traits<kDtype, kQk, kPv, 64, kRows>>;

void add_attention_small(Registry& registry) {
  registry.add(kKernel<Dtype::kBFloat16, Format::kInt8, Format::kNone, 64>);
  registry.add(kKernel<Dtype::kFloat32, Format::kInt8, Format::kInt8, 64>);
  registry.add(kKernel<Dtype::kFloat32, Format::kInt8, Format::kFp8, 64>);
  registry.add(kKernel<Dtype::kBFloat16, Format::kInt4, Format::kNone, 64>);
  registry.add(kKernel<Dtype::kFloat32, Format::kInt4, Format::kInt4, 64>);
}

}  // namespace replay
