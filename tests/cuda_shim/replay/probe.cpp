// The probe.
#include "cuda/index/probe.cu"
#include "registry.h"

namespace replay {

void add_probe(Registry& registry) {
  namespace index = permattn::index;
  using Traits = index::ProbeTraits<permattn::Dtype::kBFloat16, 64>;
  registry.add(&index::probe_totals_kernel<Traits>);
  registry.add(&index::probe_masses_kernel<Traits>);
  registry.add(&index::probe_merge_kernel);
  registry.add(&index::probe_edge_kernel);
}

}  // namespace replay
