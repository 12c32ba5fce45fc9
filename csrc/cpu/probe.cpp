// A whole probe: the first sweep sums every row over the keys, tile by tile; the second one sums
// its probabilities. Tiles depend on the sizes alone and are merged in their order, so the result
// does not depend on the threads.
#include <cmath>

#include "dispatch_internal.h"
#include "schedule.h"

namespace permattn::cpu {
namespace {

struct ProbeTiles {
  const ProbeParams& params;
  int64_t per_head, group, rows;

  explicit ProbeTiles(const ProbeParams& p)
      : params(p),
        per_head((p.size + kProbeTile - 1) / kProbeTile),
        group(p.q_heads / p.kv_heads),
        rows(p.rows) {}

  int64_t count() const { return params.batch * params.kv_heads * per_head; }

  ProbeTile operator[](int64_t i) const {
    ProbeTile tile{};
    tile.params = &params;
    tile.b = i / per_head / params.kv_heads;
    tile.kv_head = i / per_head % params.kv_heads;
    tile.first = i % per_head * kProbeTile;
    tile.size = std::min(kProbeTile, params.size - tile.first);
    return tile;
  }

  template <class Body>
  void run(const Pool& pool, size_t scratch_bytes, const Body& body) const {
    const std::vector<int64_t> costs(count(), std::min(kProbeTile, params.size) * rows * group);
    run_tiles(pool, costs, scratch_bytes, body);
  }
};

// log2-sum-exp2 [B, Hq, R]; +inf for a row that sees nothing, so that its probabilities are 0.
std::vector<float> sum_rows(const ProbeTiles& tiles, const Kernels& kernels, const Pool& pool) {
  const ProbeParams& p = tiles.params;
  const int64_t per_tile = tiles.group * tiles.rows;
  std::vector<float> top(tiles.count() * per_tile), sum(top.size());
  tiles.run(pool, kernels.probe_scratch(p), [&](int64_t i, std::byte* scratch) {
    ProbeTile tile = tiles[i];
    tile.top = &top[i * per_tile];
    tile.sum = &sum[i * per_tile];
    kernels.probe_total(tile, scratch);
  });
  std::vector<float> log2_sum(p.batch * p.q_heads * p.rows);
  for (size_t row = 0; row < log2_sum.size(); ++row) {
    // Row r of query head h: entry h % group * R + r of every tile of its key head.
    const int64_t in_tile = static_cast<int64_t>(row) % per_tile;
    const int64_t first = static_cast<int64_t>(row) / per_tile * tiles.per_head;
    float highest = -INFINITY;
    double total = 0.0;
    for (int64_t i = first; i < first + tiles.per_head; ++i) {
      highest = std::max(highest, top[i * per_tile + in_tile]);
    }
    for (int64_t i = first; i < first + tiles.per_head; ++i) {
      const double scale = std::exp2(double{top[i * per_tile + in_tile]} - highest);
      if (sum[i * per_tile + in_tile] != 0.0F) total += sum[i * per_tile + in_tile] * scale;
    }
    const double log2_total = highest + std::log2(total);
    log2_sum[row] = total == 0.0 ? INFINITY : static_cast<float>(log2_total);
    p.lse[row] = total == 0.0 ? -INFINITY : static_cast<float>(log2_total * M_LN2);
  }
  return log2_sum;
}

std::vector<float> given_rows(const ProbeParams& p) {
  std::vector<float> log2_sum(p.batch * p.q_heads * p.rows);
  for (size_t i = 0; i < log2_sum.size(); ++i) {
    log2_sum[i] = p.lse[i] == -INFINITY ? INFINITY : static_cast<float>(p.lse[i] * M_LOG2E);
  }
  return log2_sum;
}

// Tile by tile, from the first: the lags that two neighbours reach.
void add_edges(const ProbeTiles& tiles, const std::vector<float>& edges) {
  const ProbeParams& p = tiles.params;
  const int64_t shared = p.rows - 1;
  for (int64_t i = 0; i < tiles.count(); ++i) {
    const ProbeTile tile = tiles[i];
    const int64_t lowest = p.first_coordinate[tile.b] - (tile.first + tile.size - 1);
    if (p.first_position[tile.b] < 0) continue;
    for (int64_t g = 0; g < tiles.group; ++g) {
      const float* edge = &edges[(i * tiles.group + g) * shared];
      float* out = p.diagonal + (tile.b * p.q_heads + tile.kv_head * tiles.group + g) * p.size;
      const int64_t begin = std::max<int64_t>(0, -lowest);
      const int64_t end = std::min(shared, p.size - lowest);
      for (int64_t t = begin; t < end; ++t) out[lowest + t] += edge[t];
    }
  }
}

}  // namespace

void probe(const ProbeParams& params, Isa isa, const Pool& pool) {
  const Kernels kernels = select_kernels(isa, params.dtype);
  const ProbeTiles tiles(params);
  const std::vector<float> log2_sum =
      params.lse_is_given ? given_rows(params) : sum_rows(tiles, kernels, pool);
  const int64_t edge = tiles.group * (tiles.rows - 1);
  std::vector<float> edges(tiles.count() * edge + 1);
  tiles.run(pool, kernels.probe_scratch(params), [&](int64_t i, std::byte* scratch) {
    ProbeTile tile = tiles[i];
    tile.log2_sum = log2_sum.data();
    tile.edge = &edges[i * edge];
    kernels.probe_mass(tile, scratch);
  });
  add_edges(tiles, edges);
}

}  // namespace permattn::cpu
