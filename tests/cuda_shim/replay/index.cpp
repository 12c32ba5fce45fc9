// Lists of blocks.
#include "cuda/index/index.cu"
#include "registry.h"

namespace replay {

void add_index(Registry& registry) {
  namespace index = permattn::index;
  registry.add(&index::count_mask_kernel);
  registry.add(&index::list_mask_kernel);
  registry.add(&index::clear_bits_kernel);
  registry.add(&index::set_pairs_kernel);
  registry.add(&index::count_pairs_kernel);
  registry.add(&index::list_pairs_kernel);
  registry.add(&index::sum_lengths_kernel);
  registry.add(&index::order_kernel);
  registry.add(&index::pool_kernel<permattn::Dtype::kBFloat16>);
  registry.add(&index::score_kernel);
  registry.add(&index::strongest_kernel);
}

}  // namespace replay
