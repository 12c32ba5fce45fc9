// Rows made ready and their statistics, of bfloat16 and of float32.
#include "cuda/permute/instantiate.cuh"
#include "cuda/permute/instantiations/join_runs.cu"
#include "registry.h"

namespace replay {

using permattn::Dtype;

void add_prepare(Registry& registry) {
  namespace permute = permattn::permute;
  registry.add(&permute::prepare_kernel<Dtype::kBFloat16, true, true>);
  registry.add(&permute::prepare_kernel<Dtype::kBFloat16, false, false>);
  registry.add(&permute::prepare_kernel<Dtype::kFloat32, false, true>);
  registry.add(&permute::token_statistics_kernel<Dtype::kBFloat16>);
  registry.add(&permute::column_statistics_kernel<Dtype::kFloat32>);
  registry.add(&permattn::cuda::join_runs_kernel);
}

}  // namespace replay
