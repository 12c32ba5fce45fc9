// Launches of the probe.
#include "index.h"
#include "probe.cuh"

namespace permattn::index {

template <class T>
PERMATTN_GLOBAL void __launch_bounds__(kProbeThreads, T::kBlocks)
    probe_totals_kernel(const __grid_constant__ ProbeArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  probe_totals<T>(args, shared);
}
template <class T>
PERMATTN_GLOBAL void __launch_bounds__(kProbeThreads, T::kBlocks)
    probe_masses_kernel(const __grid_constant__ ProbeArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  probe_masses<T>(args, shared);
}
PERMATTN_GLOBAL void __launch_bounds__(kMergeThreads)
    probe_merge_kernel(const __grid_constant__ ProbeArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  merge_totals(args, shared);
}
PERMATTN_GLOBAL void __launch_bounds__(kProbeKeys)
    probe_edge_kernel(const __grid_constant__ ProbeArgs args) {
  add_edge(args);
}

}  // namespace permattn::index

namespace permattn::cuda {
namespace {

int64_t splits_of(const ProbeParams& p) {
  return (p.size + index::kProbeSplit - 1) / index::kProbeSplit;
}

template <class T>
const char* launch_sweeps(const index::ProbeArgs& args, void* stream) {
  const int64_t heads = args.p.batch * args.p.q_heads, blocks = heads * args.splits;
  if (!args.p.lse_is_given) {
    if (blocks > 0) {
      const char* why = launch(index::probe_totals_kernel<T>, blocks, index::kProbeThreads,
                               T::kSharedBytes, stream, args);
      if (why != nullptr) return why;
    }
    const char* why = launch(index::probe_merge_kernel, heads, index::kMergeThreads,
                             2 * index::kMergeThreads * sizeof(float), stream, args);
    if (why != nullptr) return why;
  }
  if (blocks == 0) return nullptr;
  if (const char* why = launch(index::probe_masses_kernel<T>, blocks, index::kProbeThreads,
                               T::kSharedBytes, stream, args)) {
    return why;
  }
  return launch(index::probe_edge_kernel, blocks, index::kProbeKeys, 0, stream, args);
}

template <Dtype kDtype>
const char* launch_dims(const index::ProbeArgs& args, void* stream) {
  if (args.p.head_dim <= 64) return launch_sweeps<index::ProbeTraits<kDtype, 64>>(args, stream);
  if (args.p.head_dim <= 128) return launch_sweeps<index::ProbeTraits<kDtype, 128>>(args, stream);
  return launch_sweeps<index::ProbeTraits<kDtype, 256>>(args, stream);
}

}  // namespace

int64_t probe_scratch(const ProbeParams& p) {
  return 3 * p.batch * p.q_heads * splits_of(p) * index::kProbeRows;
}

const char* launch_probe(const ProbeParams& p, int64_t all_rows, float* scratch, void* stream) {
  if (p.rows < 1 || p.rows > index::kProbeRows) return "probe: wants 1 to 64 rows";
  if (p.head_dim < 8 || p.head_dim > 256 || p.head_dim % 8 != 0) {
    return "probe: wants head dims that are multiples of 8 up to 256";
  }
  if (p.batch * p.q_heads == 0) return nullptr;
  if (p.size > INT32_MAX - index::kProbeSplit) return "probe: wants fewer than 2^31 - 1024 keys";
  const int64_t each = probe_scratch(p) / 3;
  const index::ProbeArgs args{p,
                              static_cast<int32_t>(splits_of(p)),
                              1.0F / static_cast<float>(all_rows),
                              scratch,
                              scratch + each,
                              scratch + 2 * each};
  if (p.dtype == Dtype::kBFloat16) return launch_dims<Dtype::kBFloat16>(args, stream);
  if (p.dtype == Dtype::kFloat16) return launch_dims<Dtype::kFloat16>(args, stream);
  return "probe: computes in bfloat16 or float16";
}

}  // namespace permattn::cuda
