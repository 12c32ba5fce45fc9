// Preparing rows over threads: runs of whole groups of one head. Statistics first where the norm
// looks across heads. Nothing depends on the threads.
#include <limits>

#include "dispatch_internal.h"
#include "passes.h"
#include "schedule.h"

namespace permattn::cpu {
namespace {

constexpr int64_t kRowsPerTile = 256;
// What one number costs in the pairs of tokens by which tiles are counted.
constexpr int64_t kCostPerRow = 64;

bool needs_token_stats(const PrepareParams& p) {
  return p.transform.across_heads && p.transform.norm != Transform::Norm::kNone &&
         p.token_stats == nullptr;
}

// [B, S, 2] for a norm across heads.
std::unique_ptr<float[]> token_statistics(const PrepareParams& p, const Kernels& kernels,
                                          const Pool& pool) {
  std::unique_ptr<float[]> stats(new float[2 * p.batch * p.tokens]);
  const int64_t runs = (p.tokens + kRowsPerTile - 1) / kRowsPerTile;
  const std::vector<int64_t> costs(p.batch * runs, kRowsPerTile * kCostPerRow * p.heads);
  run_tiles(pool, costs, 0, [&](int64_t i, std::byte*) {
    TokenTile tile{&p, i / runs, i % runs * kRowsPerTile, 0, stats.get()};
    tile.size = std::min(kRowsPerTile, p.tokens - tile.token);
    kernels.prepare_tokens(tile);
  });
  return stats;
}

}  // namespace

void prepare_with(const PrepareParams& given, const Kernels& kernels, const Pool& pool) {
  if (given.batch * given.out_heads * given.padded_slots == 0) return;
  PrepareParams p = given;
  std::unique_ptr<float[]> stats;
  if (needs_token_stats(p)) {
    stats = token_statistics(p, kernels, pool);
    p.token_stats = stats.get();
  }
  const int64_t group = p.format == Format::kNone ? 1 : std::min(p.rows_per_scale, p.padded_slots);
  const int64_t rows = std::max<int64_t>(1, kRowsPerTile / group) * group;
  const int64_t runs = (p.padded_slots + rows - 1) / rows;
  const std::vector<int64_t> costs(p.batch * p.out_heads * runs, rows * kCostPerRow);
  run_tiles(pool, costs, kernels.prepare_scratch(p), [&](int64_t i, std::byte* scratch) {
    const int64_t head = i / runs;
    PrepareTile tile{&p, head / p.out_heads, head % p.out_heads, i % runs * rows, 0};
    tile.size = std::min(rows, p.padded_slots - tile.slot);
    kernels.prepare(tile, scratch);
  });
}

void prepare(const PrepareParams& params, Isa isa, const Pool& pool) {
  prepare_with(params, select_kernels(isa, params.dtype), pool);
}

void column_statistics(const ColumnParams& given, Isa isa, const Pool& pool) {
  ColumnParams c = given;
  PrepareParams& p = c.source;
  const Kernels kernels = select_kernels(isa, p.dtype);
  const int64_t heads = p.batch * p.heads;
  std::unique_ptr<float[]> stats;
  if (needs_token_stats(p)) {
    stats = token_statistics(p, kernels, pool);
    p.token_stats = stats.get();
  }
  constexpr int64_t kTokens = 512;
  const int64_t runs = (p.tokens + kTokens - 1) / kTokens;
  const int64_t per_run = 3 * p.dim;
  std::vector<float> found(heads * runs * per_run);
  const std::vector<int64_t> costs(heads * runs, kTokens * kCostPerRow);
  run_tiles(pool, costs, 4 * kMaxHeadDim * sizeof(float), [&](int64_t i, std::byte* scratch) {
    const int64_t head = i / runs;
    float* own = &found[i * per_run];
    ColumnTile tile{&c,  head / p.heads, head % p.heads, i % runs * kTokens, 0,
                    own, own + p.dim,    own + 2 * p.dim};
    tile.size = std::min(kTokens, p.tokens - tile.token);
    kernels.prepare_columns(tile, scratch);
  });
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t d = 0; d < p.dim; ++d) {
      double sum = 0.0;
      float lowest = kInfinity, highest = -kInfinity;
      for (int64_t i = head * runs; i < (head + 1) * runs; ++i) {
        const float* own = &found[i * per_run];
        sum += own[d];
        lowest = std::min(lowest, own[p.dim + d]);
        highest = std::max(highest, own[2 * p.dim + d]);
      }
      c.sum[head * p.dim + d] = static_cast<float>(sum);
      c.lowest[head * p.dim + d] = lowest;
      c.highest[head * p.dim + d] = highest;
    }
  }
}

}  // namespace permattn::cpu
