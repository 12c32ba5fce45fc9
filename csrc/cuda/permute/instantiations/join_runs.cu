// The second stage of column statistics.
#include "../statistics.cuh"

namespace permattn::cuda {

PERMATTN_GLOBAL void join_runs_kernel(const __grid_constant__ ColumnStatisticsArgs args) {
  permute::join_runs(args);
}

const char* launch_join_runs(const ColumnStatisticsArgs& args, void* stream) {
  const PrepareParams& p = args.c.source;
  return launch(join_runs_kernel, p.batch * p.heads, kStatisticsThreads, 0, stream, args);
}

}  // namespace permattn::cuda
