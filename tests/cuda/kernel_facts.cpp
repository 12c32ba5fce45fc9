// What the sources say of every kernel, as one line of JSON each: threads of a block and dynamic
// shared memory, which machine code does not show. A host program; runs nothing.
#include <algorithm>
#include <cstdio>

#include "cuda/config.h"
#include "cuda/index/blocks.cuh"
#include "cuda/index/lists.cuh"
#include "cuda/index/order.cuh"
#include "cuda/index/probe.cuh"
#include "cuda/permute/prepare.h"
#include "cuda/permute/statistics.cuh"
#include "cuda/permute/tiling.h"
#include "cuda/sm80/dispatch.h"
#include "cuda/sm80/finish.cu"
#include "cuda/sm80/traits.cuh"
#include "cuda/sm90/kernels.h"

using namespace permattn;

namespace {

void print(const char* kernel, int threads, int shared) {
  std::printf("{\"kernel\": \"%s\", \"threads\": %d, \"dynamic_shared\": %d}\n", kernel, threads,
              shared);
}

void print_attention(const char* family, Dtype dtype, Format qk, Format pv, int dim, int last,
                     int threads, int shared) {
  constexpr const char* kDtypes[] = {"float32", "bfloat16", "float16"};
  constexpr const char* kFormats[] = {"none", "int8", "int4", "fp8"};
  char name[160];
  std::snprintf(name, sizeof(name), "%s::attention_kernel<%s, %s, %s, %d, %d>", family,
                kDtypes[int(dtype)], kFormats[int(qk)], kFormats[int(pv)], dim, last);
  print(name, threads, shared);
}

template <Dtype kDtype, Format kQk, Format kPv>
void print_sm80() {
  for (const int dim : {64, 96, 128, 256}) {
    for (const int rows : {64, 128}) {
      cuda::Config config{};
      config.dim = dim;
      config.block_m = rows;
      sm80::visit_dims<kDtype, kQk, kPv>(
          config, [&]<int kDim, int kRows>(sm80::Kernel<kDtype, kQk, kPv, kDim, kRows>) {
            using T = sm80::Traits<kDtype, kQk, kPv, kDim, kRows>;
            print_attention("sm80", kDtype, kQk, kPv, kDim, kRows, T::kThreads, T::kSharedBytes);
            return static_cast<const char*>(nullptr);
          });
    }
  }
}

// Most shared memory that rows made ready ask for, over everything that may be asked of them.
int most_for_rows() {
  int most = 0;
  const float angle = 0;
  for (const Format format : {Format::kNone, Format::kInt8, Format::kInt4, Format::kFp8}) {
    for (int rows = 1; rows <= cuda::kMaxRowsPerScale; ++rows) {
      for (int dim = 8; dim <= 256; dim += 8) {
        PrepareParams p{};
        p.format = format;
        p.dim = dim;
        p.rows_per_scale = rows;
        p.transform.cos = &angle;
        const auto asks = [&] { return cuda::shared_of(p, cuda::tiling_of(p)).bytes; };
        for (const bool per_column : {false, true}) {
          p.per_column = per_column;
          p.layout = Layout::kRows;
          most = std::max(most, asks());
          // Fragments want whole runs of slots.
          if (rows % (format == Format::kInt4 ? 32 : 16) != 0) continue;
          p.layout = Layout::kFragments;
          most = std::max(most, asks());
        }
      }
    }
  }
  return most;
}

template <Dtype kDtype, int kDim>
void print_probe(const char* dtype) {
  using T = index::ProbeTraits<kDtype, kDim>;
  for (const char* sweep : {"totals", "masses"}) {
    char name[80];
    std::snprintf(name, sizeof(name), "index::probe_%s_kernel<%s, %d>", sweep, dtype, kDim);
    print(name, index::kProbeThreads, T::kSharedBytes);
  }
}

void print_probes() {
  print_probe<Dtype::kBFloat16, 64>("bfloat16");
  print_probe<Dtype::kBFloat16, 128>("bfloat16");
  print_probe<Dtype::kBFloat16, 256>("bfloat16");
  print_probe<Dtype::kFloat16, 64>("float16");
  print_probe<Dtype::kFloat16, 128>("float16");
  print_probe<Dtype::kFloat16, 256>("float16");
  // Two numbers a thread.
  print("index::probe_merge_kernel", index::kMergeThreads, 2 * index::kMergeThreads * 4);
  print("index::probe_edge_kernel", index::kProbeKeys, 0);
}

// Of kernels whose shared memory a problem sizes: the most that any may ask for.
void print_others() {
  const int rows = most_for_rows();
  for (const char* dtype : {"float32", "bfloat16", "float16"}) {
    char name[80];
    for (const char* flags : {"false, false", "false, true", "true, false", "true, true"}) {
      std::snprintf(name, sizeof(name), "permute::prepare_kernel<%s, %s>", dtype, flags);
      print(name, cuda::kMaxThreads, rows);
    }
    std::snprintf(name, sizeof(name), "permute::token_statistics_kernel<%s>", dtype);
    print(name, cuda::kStatisticsThreads, 0);
    std::snprintf(name, sizeof(name), "permute::column_statistics_kernel<%s>", dtype);
    print(name, cuda::kStatisticsThreads, permute::kColumnShared);
    std::snprintf(name, sizeof(name), "index::pool_kernel<%s>", dtype);
    print(name, index::kThreads, index::kPoolShared);
  }
  for (const char* name :
       {"clear_bits", "count_mask", "count_pairs", "list_mask", "list_pairs", "set_pairs"}) {
    char kernel[80];
    std::snprintf(kernel, sizeof(kernel), "index::%s_kernel", name);
    print(kernel, index::kThreads, 0);
  }
  print("cuda::finish_kernel", cuda::kThreads, 0);
  print("cuda::join_runs_kernel", cuda::kStatisticsThreads, 0);
  print("index::sum_lengths_kernel", index::kSumThreads, index::kSumThreads / 32 * 4);
  print("index::order_kernel", index::kSumThreads, index::kOrderShared);
  print("index::score_kernel", index::kThreads, index::kScoreShared);
  print("index::strongest_kernel", index::kThreads, index::kStrongestShared);
}

}  // namespace

int main() {
  constexpr auto kBf16 = Dtype::kBFloat16, kF16 = Dtype::kFloat16, kAny = Dtype::kFloat32;
  constexpr auto kNone = Format::kNone, kInt8 = Format::kInt8, kInt4 = Format::kInt4;
  print_sm80<kBf16, kNone, kNone>();
  print_sm80<kF16, kNone, kNone>();
  print_sm80<kBf16, kInt8, kNone>();
  print_sm80<kF16, kInt8, kNone>();
  print_sm80<kBf16, kInt4, kNone>();
  print_sm80<kF16, kInt4, kNone>();
  print_sm80<kAny, kInt8, kInt8>();
  print_sm80<kAny, kInt8, kInt4>();
  print_sm80<kAny, kInt8, Format::kFp8>();
  print_sm80<kAny, kInt4, kInt4>();
#define PERMATTN_PRINT_SM90(dtype, qk, pv, dim, block_n)                                      \
  print_attention("sm90", Dtype::dtype, Format::qk, Format::pv, dim, block_n, sm90::kThreads, \
                  sm90::Traits<Dtype::dtype, Format::qk, Format::pv, dim, block_n>::kSharedBytes);
  PERMATTN_SM90_KERNELS(PERMATTN_PRINT_SM90)
  print_probes();
  print_others();
}
