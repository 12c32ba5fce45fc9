// Attention from region to region over threads: heads that share a graph side by side where regions
// are small, and runs of regions where there are few heads. Nothing depends on the threads.
#include "regions.h"

#include <algorithm>

#include "cpu.h"
#include "schedule.h"

namespace permattn::cpu {
namespace {

RegionKernels kernels_of(Isa isa, Dtype dtype) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmxBf16:  // regions are smaller than tiles
    case Isa::kAvx512Bf16:
      return avx512_bf16_region_kernels(dtype);
    case Isa::kAvx512Vnni:
    case Isa::kAvx512:
      return avx512_region_kernels(dtype);
    case Isa::kAvx2:
      return avx2_region_kernels(dtype);
#endif
    default:
      return portable_region_kernels(dtype);
  }
}

// The functions of `isa`, and of the best one below it where it has none of its own.
RegionKernels select_region_kernels(Isa isa, Dtype dtype, bool backward) {
  for (int32_t i = static_cast<int32_t>(isa); i > 0; --i) {
    const RegionKernels kernels = kernels_of(static_cast<Isa>(i), dtype);
    if (backward ? kernels.backward[0] != nullptr : kernels.forward[0] != nullptr) return kernels;
  }
  return portable_region_kernels(dtype);
}

// log2 of the heads that lie side by side: as many as fill the lanes with a region's queries. Not
// fewer where threads idle: sums must not depend on them.
int32_t heads_abreast(const RegionParams& p, const RegionKernels& kernels) {
  const bool shared = p.graph_stride_m == 0 && (p.weights == nullptr || p.weights_stride_m == 0);
  int32_t log2 = 0;
  while (shared && log2 + 1 < kNumHeadsAbreast && kernels.forward_scratch[log2 + 1] != nullptr &&
         p.heads % (2 << log2) == 0 && (p.q_grid.cells() << log2) < kernels.lanes) {
    ++log2;
  }
  return log2;
}

// Pairs of tokens of one query region, with what packing it costs.
int64_t region_cost(const RegionParams& p, int64_t heads) {
  constexpr int64_t kMost = int64_t{1} << 30, kPacking = 4;
  return heads * std::min(p.q_grid.cells() * (p.topk * p.kv_grid.cells() + kPacking), kMost);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs of query regions per head: enough to share among the threads.
int64_t num_runs(const Pool& pool, int64_t units, int64_t regions) {
  constexpr int64_t kTasksPerThread = 3;
  return std::clamp<int64_t>(ceil_div(kTasksPerThread * pool.num_threads, units), 1, regions);
}

}  // namespace

void attend_regions(const RegionParams& p, Isa isa, const Pool& pool) {
  const int64_t regions = p.q_grid.num_regions();
  if (p.batch * p.heads * regions == 0) return;
  const RegionKernels kernels = select_region_kernels(isa, p.dtype, false);
  const int32_t abreast = heads_abreast(p, kernels);
  const int64_t groups = p.heads >> abreast;
  const int64_t units = p.batch * groups;
  const int64_t runs = num_runs(pool, units, regions);
  const std::vector<int64_t> costs(units * runs, region_cost(p, 1 << abreast) * regions / runs);
  run_tiles(pool, costs, kernels.forward_scratch[abreast](p), [&](int64_t i, std::byte* scratch) {
    const int64_t unit = i / runs, run = i % runs;
    kernels.forward[abreast]({&p, unit / groups, unit % groups << abreast, run * regions / runs,
                              (run + 1) * regions / runs},
                             scratch);
  });
}

void attend_regions_backward(const RegionBwdParams& b, Isa isa, const Pool& pool) {
  const RegionParams& p = b.forward;
  const int64_t regions = p.q_grid.num_regions(), kv_regions = p.kv_grid.num_regions();
  if (p.batch * p.heads == 0) return;
  const RegionKernels kernels = select_region_kernels(isa, p.dtype, true);
  const int32_t abreast = heads_abreast(p, kernels);
  const int64_t groups = p.heads >> abreast;
  const int64_t units = p.batch * groups;
  // One task a unit shares scores between dQ and dK, but only so many threads can work.
  const int64_t rounds = ceil_div(units, pool.num_threads);
  const bool whole = 2 * rounds * pool.num_threads <= 3 * units;
  const int64_t runs = whole ? 1 : num_runs(pool, units, regions);
  const int64_t kv_runs = whole ? 0 : num_runs(pool, units, kv_regions);
  const int64_t cost = region_cost(p, 1 << abreast) * regions;
  std::vector<int64_t> costs(units * runs, cost / runs);
  if (!whole) costs.resize(units * (runs + kv_runs), cost / kv_runs);
  run_tiles(pool, costs, kernels.backward_scratch[abreast](p), [&](int64_t i, std::byte* scratch) {
    const bool is_dkv = i >= units * runs;
    const int64_t at = is_dkv ? i - units * runs : i;
    const int64_t per_unit = is_dkv ? kv_runs : runs;
    const int64_t unit = at / per_unit, run = at % per_unit;
    RegionBwdTask task{&b, unit / groups, unit % groups << abreast, 0, 0, 0,
                       0,  !is_dkv,       is_dkv || whole};
    if (task.wants_dq) {
      task.first = run * regions / runs;
      task.last = (run + 1) * regions / runs;
    }
    if (task.wants_dkv) {
      task.kv_first = is_dkv ? run * kv_regions / kv_runs : 0;
      task.kv_last = is_dkv ? (run + 1) * kv_regions / kv_runs : kv_regions;
    }
    kernels.backward[abreast](task, scratch);
  });
}

}  // namespace permattn::cpu
