// Backward of a whole plan: dQ by groups of parts that share an order of queries, dK and dV part by
// part and query head by query head, so that no two tiles of one pass write the same row.
#include <memory>

#include "dispatch_internal.h"
#include "schedule.h"

namespace permattn::cpu {
namespace {

struct Pass {
  std::vector<int32_t> parts;
  bool lanes_are_keys;
  int64_t head_in_group;  // which query head of every key head; only where lanes are keys
};

const IndexView& index_of(const PlanPart& part, bool lanes_are_keys) {
  return lanes_are_keys ? part.transposed : part.index;
}

void run_pass(const BwdParams& params, const Pass& pass, const float* delta, const Kernels& kernels,
              const Pool& pool) {
  const Problem& problem = params.problem;
  const bool keys = pass.lanes_are_keys;
  const PlanPart& first = problem.parts[pass.parts[0]];
  std::vector<int64_t> blocks;
  for (const int32_t i : pass.parts) blocks.push_back(index_of(problem.parts[i], keys).block_row);
  const PermView& perm = keys ? first.kv_perm : first.q_perm;
  const std::vector<int64_t> bounds = tile_bounds(perm.token_of_slot.size, blocks);
  const int64_t tiles = static_cast<int64_t>(bounds.size()) - 1;
  const int64_t heads = keys ? problem.kv_heads : problem.q_heads;
  const int64_t stride = keys ? problem.q_heads / problem.kv_heads : 1;
  std::vector<int64_t> costs;
  costs.reserve(problem.batch * heads * tiles);
  for (int64_t i = 0; i < problem.batch * heads * tiles; ++i) {
    const int64_t head = i / tiles;
    const int64_t h = head % heads * stride + pass.head_in_group;
    const int64_t slot = bounds[i % tiles];
    int64_t columns = 0;
    for (const int32_t part : pass.parts) {
      const IndexView& index = index_of(problem.parts[part], keys);
      columns += row_slots(index, head / heads, h, slot / index.block_row);
    }
    costs.push_back((columns + 1) * (bounds[i % tiles + 1] - slot));
  }
  run_tiles(pool, costs, kernels.backward_scratch(problem), [&](int64_t i, std::byte* scratch) {
    const int64_t head = i / tiles;
    const BwdTile tile{&params,
                       delta,
                       pass.parts.data(),
                       static_cast<int32_t>(pass.parts.size()),
                       keys,
                       head / heads,
                       head % heads * stride + pass.head_in_group,
                       bounds[i % tiles],
                       bounds[i % tiles + 1] - bounds[i % tiles]};
    kernels.backward(tile, scratch);
  });
}

void compute_delta(const BwdParams& params, float* delta, const Kernels& kernels,
                   const Pool& pool) {
  constexpr int64_t kTokens = 1024;
  const Problem& problem = params.problem;
  const int64_t runs = (problem.sq + kTokens - 1) / kTokens;
  const std::vector<int64_t> costs(problem.batch * problem.q_heads * runs, kTokens * 16);
  run_tiles(pool, costs, 0, [&](int64_t i, std::byte*) {
    const int64_t head = i / runs;
    BwdTile tile{};
    tile.params = &params;
    tile.b = head / problem.q_heads;
    tile.h = head % problem.q_heads;
    tile.slot = i % runs * kTokens;
    tile.size = std::min(kTokens, problem.sq - tile.slot);
    kernels.backward_delta(tile, delta);
  });
}

}  // namespace

void backward(const BwdParams& params, Isa isa, const Pool& pool) {
  const Problem& problem = params.problem;
  const int64_t queries = problem.batch * problem.q_heads * problem.sq;
  if (queries == 0 || problem.skv == 0) return;
  const Kernels kernels = select_kernels(isa, problem.dtype);
  const std::unique_ptr<float[]> delta(new float[queries]);
  compute_delta(params, delta.get(), kernels, pool);
  std::vector<Pass> passes;
  for (int32_t i = 0; i < problem.num_parts; ++i) {
    const auto group = static_cast<size_t>(problem.parts[i].group);
    if (group >= passes.size()) passes.resize(group + 1, Pass{{}, false, 0});
    passes[group].parts.push_back(i);
  }
  for (int32_t i = 0; i < problem.num_parts; ++i) {
    for (int64_t g = 0; g < problem.q_heads / problem.kv_heads; ++g)
      passes.push_back({{i}, true, g});
  }
  for (const Pass& pass : passes) run_pass(params, pass, delta.get(), kernels, pool);
}

}  // namespace permattn::cpu
