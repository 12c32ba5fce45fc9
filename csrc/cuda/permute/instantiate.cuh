// Kernels of one type of x: what an instantiation file turns into code.
#pragma once
#include "launch_rows.h"
#include "prepare.cuh"
#include "statistics.cuh"

namespace permattn::permute {

template <Dtype kDtype, bool kHolds, bool kTransformed>
PERMATTN_GLOBAL void __launch_bounds__(cuda::kMaxThreads, 1)
    prepare_kernel(const __grid_constant__ PrepareArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  prepare<kDtype, kHolds, kTransformed>(args, shared);
}

template <Dtype kDtype>
PERMATTN_GLOBAL void __launch_bounds__(cuda::kStatisticsThreads)
    token_statistics_kernel(const __grid_constant__ cuda::TokenStatisticsArgs args) {
  token_statistics<kDtype>(args);
}

template <Dtype kDtype>
PERMATTN_GLOBAL void __launch_bounds__(cuda::kStatisticsThreads)
    column_statistics_kernel(const __grid_constant__ cuda::ColumnStatisticsArgs args) {
  PERMATTN_DYNAMIC_SHARED(shared);
  column_statistics<kDtype>(args, shared);
}

}  // namespace permattn::permute

namespace permattn::cuda {

template <Dtype kDtype>
const char* launch_rows(const PrepareArgs& args, void* stream) {
  const PrepareTiling& t = args.tiling;
  const Transform& by = args.p.transform;
  const bool is_transformed =
      by.norm != Transform::Norm::kNone || by.cos != nullptr || args.p.dots != nullptr;
  const auto run = [&](auto kernel) {
    const int64_t blocks = args.p.batch * args.p.out_heads * t.tiles;
    return launch(kernel, blocks, t.threads, args.shared.bytes, stream, args);
  };
  if (t.quads_per_thread == 1) {
    return is_transformed ? run(permute::prepare_kernel<kDtype, true, true>)
                          : run(permute::prepare_kernel<kDtype, true, false>);
  }
  return is_transformed ? run(permute::prepare_kernel<kDtype, false, true>)
                        : run(permute::prepare_kernel<kDtype, false, false>);
}

template <Dtype kDtype>
const char* launch_token_rows(const TokenStatisticsArgs& args, void* stream) {
  constexpr int64_t kWarps = kStatisticsThreads / 32;
  const int64_t blocks = (args.p.batch * args.p.tokens + kWarps - 1) / kWarps;
  return launch(permute::token_statistics_kernel<kDtype>, blocks, kStatisticsThreads, 0, stream,
                args);
}

template <Dtype kDtype>
const char* launch_column_runs(const ColumnStatisticsArgs& args, void* stream) {
  const PrepareParams& p = args.c.source;
  return launch(permute::column_statistics_kernel<kDtype>, p.batch * p.heads * args.runs,
                kStatisticsThreads, permute::kColumnShared, stream, args);
}

}  // namespace permattn::cuda

#define PERMATTN_INSTANTIATE_PREPARE(dtype)                                           \
  namespace permattn::cuda {                                                          \
  template const char* launch_rows<dtype>(const PrepareArgs&, void*);                 \
  template const char* launch_token_rows<dtype>(const TokenStatisticsArgs&, void*);   \
  template const char* launch_column_runs<dtype>(const ColumnStatisticsArgs&, void*); \
  }
