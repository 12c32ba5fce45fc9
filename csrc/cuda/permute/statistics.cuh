// Sums over tokens and over heads, in a fixed order.
#pragma once
#include "launch_rows.h"
#include "row_reader.cuh"

namespace permattn::permute {

// Mean (layer norm) and inverse deviation of a token over all of its heads.
template <Dtype kDtype>
PERMATTN_DEVICE void token_statistics(const cuda::TokenStatisticsArgs& args) {
  using Reader = RowLoader<kDtype>;
  const PrepareParams& p = args.p;
  const uint32_t warp = blockIdx.x * (cuda::kStatisticsThreads / 32) + threadIdx.x / 32;
  if (warp >= p.batch * p.tokens) return;
  const auto tokens = static_cast<uint32_t>(p.tokens);
  const auto b = static_cast<int32_t>(warp / tokens), token = static_cast<int32_t>(warp % tokens);
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % 32;
  const auto chunks = static_cast<int32_t>(p.heads) * args.lanes;

  const auto sum_of = [&](auto term) {
    float all = 0.0F;
    for (int32_t at = warp_lane; at < chunks; at += 32) {
      const Reader reader{p, b, at / args.lanes, args.lanes, at % args.lanes, args.whole_x};
      typename Reader::Chunk chunk;
      float x[kChunk];
      reader.load(token, chunk);
      Type<kDtype>::unpack(chunk, x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) all += i < reader.columns_left() ? term(x[i]) : 0.0F;
    }
    return row_sum(all, 32);
  };
  const auto count = static_cast<float>(p.heads * p.dim);
  float mean = 0.0F;
  if (p.transform.norm == Transform::Norm::kLayer) {
    mean = quotient(sum_of([](float x) { return x; }), count);
  }
  const float square = sum_of([mean](float x) { return (x - mean) * (x - mean); });
  if (warp_lane != 0) return;
  args.stats[2 * static_cast<int64_t>(warp)] = mean;
  args.stats[2 * static_cast<int64_t>(warp) + 1] =
      quotient(1.0F, square_root(sum(quotient(square, count), p.transform.eps)));
}

// Rows that change halves, then what every thread found.
constexpr int32_t kColumnShared = cuda::kStatisticsThreads * kChunk * 4 * 3;

// Sum, lowest and highest of the transformed columns of a run of tokens.
template <Dtype kDtype>
PERMATTN_DEVICE void column_statistics(const cuda::ColumnStatisticsArgs& args, char* shared) {
  using Reader = RowLoader<kDtype>;
  const PrepareParams& p = args.c.source;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto heads = static_cast<uint32_t>(p.heads), runs = static_cast<uint32_t>(args.runs);
  const uint32_t h = blockIdx.x % heads, run = blockIdx.x / heads % runs;
  const uint32_t b = blockIdx.x / heads / runs;
  const Reader reader{p,          static_cast<int32_t>(b), static_cast<int32_t>(h),
                      args.lanes, thread % args.lanes,     args.whole.x};
  const RowTransform<false> transform(
      reader, args.whole, true, reinterpret_cast<float*>(shared) + thread / 32 * (32 * kChunk));
  const uint8_t* seen = args.c.seen == nullptr
                            ? nullptr
                            : args.c.seen + b * args.c.seen_stride_b + h * args.c.seen_stride_h;
  constexpr float kInfinity = __builtin_huge_valf();
  float total[kChunk], lowest[kChunk], highest[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    total[i] = 0.0F;
    lowest[i] = kInfinity;
    highest[i] = -kInfinity;
  }
  // Some rows are asked for before the first is waited for.
  constexpr int kAhead = kDtype == Dtype::kFloat32 ? 2 : 4;
  const int32_t units = cuda::kStatisticsThreads / args.lanes;
  for (int64_t at = thread / args.lanes; at < cuda::kTokensPerRun; at += kAhead * units) {
    typename Reader::Chunk chunk[kAhead];
    int32_t token[kAhead];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int64_t place = run * cuda::kTokensPerRun + at + s * units;
      const bool counts = place < p.tokens && (seen == nullptr || seen[place] != 0);
      token[s] = counts ? static_cast<int32_t>(place) : -1;
      reader.load(token[s], chunk[s]);
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      float x[kChunk];
      Type<kDtype>::unpack(chunk[s], x);
      transform.apply(token[s], x);
      if (token[s] < 0) continue;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        total[i] += x[i];
        lowest[i] = x[i] < lowest[i] ? x[i] : lowest[i];
        highest[i] = x[i] > highest[i] ? x[i] : highest[i];
      }
    }
  }
  __syncthreads();
  auto* found = reinterpret_cast<float*>(shared);  // [3][units][columns]
  const int32_t columns = args.lanes * kChunk;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    float* to = found + thread * kChunk + i;
    to[0] = total[i];
    to[units * columns] = lowest[i];
    to[2 * units * columns] = highest[i];
  }
  __syncthreads();
  float* to = args.found + ((static_cast<int64_t>(b) * heads + h) * runs + run) * 3 * p.dim;
  for (int32_t d = thread; d < p.dim; d += cuda::kStatisticsThreads) {
    float all = 0.0F, least = kInfinity, most = -kInfinity;
    for (int32_t unit = 0; unit < units; ++unit) {
      const float* from = found + unit * columns + d;
      const float low = from[units * columns], high = from[2 * units * columns];
      all += from[0];
      least = low < least ? low : least;
      most = high > most ? high : most;
    }
    to[d] = all;
    to[p.dim + d] = least;
    to[2 * p.dim + d] = most;
  }
}

// The runs of a head, one after another.
PERMATTN_DEVICE void join_runs(const cuda::ColumnStatisticsArgs& args) {
  const ColumnParams& c = args.c;
  const int64_t dim = c.source.dim, head = blockIdx.x;
  for (int64_t d = threadIdx.x; d < dim; d += cuda::kStatisticsThreads) {
    double all = 0.0;
    float least = __builtin_huge_valf(), most = -__builtin_huge_valf();
    for (int64_t run = 0; run < args.runs; ++run) {
      const float* from = args.found + (head * args.runs + run) * 3 * dim + d;
      all += static_cast<double>(from[0]);
      least = from[dim] < least ? from[dim] : least;
      most = from[2 * dim] > most ? from[2 * dim] : most;
    }
    c.sum[head * dim + d] = static_cast<float>(all);
    c.lowest[head * dim + d] = least;
    c.highest[head * dim + d] = most;
  }
}

}  // namespace permattn::permute
