// What prepare.cpp and statistics.cpp find in the instantiations.
#pragma once
#include "tiling.h"

namespace permattn::cuda {

// For a filled PrepareArgs; kDtype is that of x.
template <Dtype kDtype>
const char* launch_rows(const PrepareArgs& args, void* stream);

constexpr int32_t kStatisticsThreads = 256;
constexpr int64_t kTokensPerRun = 512;

// Of tokens across heads, a warp each.
struct TokenStatisticsArgs {
  PrepareParams p;
  int32_t lanes;
  bool whole_x;
  float* stats;  // [B, S, 2]
};

// Of columns over runs of tokens, a block each.
struct ColumnStatisticsArgs {
  ColumnParams c;
  int32_t lanes;
  int64_t runs;  // of a head
  WholeLoads whole;
  float* found;  // [B, H, runs, 3, D]: sum, lowest, highest
};

template <Dtype kDtype>
const char* launch_token_rows(const TokenStatisticsArgs& args, void* stream);
template <Dtype kDtype>
const char* launch_column_runs(const ColumnStatisticsArgs& args, void* stream);
const char* launch_join_runs(const ColumnStatisticsArgs& args, void* stream);

}  // namespace permattn::cuda
