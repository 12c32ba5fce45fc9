// The CPU kernels as the binding sees them. Raw pointers and a thread pool; no torch.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/params.h"
#include "../common/quant.h"
#include "../common/regions.h"
#include "../common/route.h"

namespace permattn::cpu {

// The caller's thread pool. `run` calls body(context, i) for every i in [0, num_workers), each
// once, on any thread, and returns when all are done.
struct Pool {
  int64_t num_threads;
  void (*run)(int64_t num_workers, void (*body)(void* context, int64_t worker), void* context);
};

// Whether this machine can run it (and the kernel was built for this architecture).
bool isa_is_available(Isa isa);

// The best one here.
Isa best_isa();

// Longest group of keys that shares a scale.
constexpr int64_t kMaxKeysPerScale = 256;

void forward(const FwdParams& params, Isa isa, const Pool& pool);
void backward(const BwdParams& params, Isa isa, const Pool& pool);
void probe(const ProbeParams& params, Isa isa, const Pool& pool);

// Region means, affinities and the largest of every row.
void route(const RouteParams& params, Isa isa, const Pool& pool);

// One pass over x: gather, norm, rotary embedding, smoothing, quantising.
void prepare(const PrepareParams& params, Isa isa, const Pool& pool);
// Sums, minima and maxima of transformed columns.
void column_statistics(const ColumnParams& params, Isa isa, const Pool& pool);
// Prepares q, k and v, and attends; params.quantised is filled here.
void forward_quantised(const FwdParams& params, const QuantisedCall& call, Isa isa,
                       const Pool& pool);

// Attention from region to region.
void attend_regions(const RegionParams& params, Isa isa, const Pool& pool);
void attend_regions_backward(const RegionBwdParams& params, Isa isa, const Pool& pool);

}  // namespace permattn::cpu
