// Forward of a whole plan: groups of parts that share an order of queries, tiles of each, and one
// softmax over all of them.
#include <memory>

#include "dispatch_internal.h"
#include "passes.h"
#include "schedule.h"

namespace permattn::cpu {
namespace {

struct GroupPlan {
  std::vector<int32_t> parts;
  std::vector<int64_t> bounds;  // of its tiles
  Group group{};
  std::unique_ptr<float[]> rows, log2_sum;

  int64_t num_tiles() const { return static_cast<int64_t>(bounds.size()) - 1; }
};

std::vector<GroupPlan> split_into_groups(const Problem& problem) {
  std::vector<GroupPlan> groups;
  for (int32_t i = 0; i < problem.num_parts; ++i) {
    const auto group = static_cast<size_t>(problem.parts[i].group);
    if (group >= groups.size()) groups.resize(group + 1);
    groups[group].parts.push_back(i);
  }
  for (GroupPlan& group : groups) {
    group.group.q_perm = problem.parts[group.parts[0]].q_perm;
    group.group.parts = group.parts.data();
    group.group.num_parts = static_cast<int32_t>(group.parts.size());
    std::vector<int64_t> blocks;
    for (const int32_t i : group.parts) blocks.push_back(problem.parts[i].index.block_row);
    group.bounds = tile_bounds(group.group.q_perm.token_of_slot.size, blocks);
  }
  return groups;
}

// Pairs of slots that every tile of a group looks at, in (batch, head, tile) order, last tile
// first: causal rows grow.
std::vector<int64_t> tile_costs(const Problem& problem, const GroupPlan& group) {
  std::vector<int64_t> costs;
  costs.reserve(problem.batch * problem.q_heads * group.num_tiles());
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t h = 0; h < problem.q_heads; ++h) {
      for (int64_t t = group.num_tiles() - 1; t >= 0; --t) {
        const int64_t slot = group.bounds[t];
        int64_t keys = 0;
        for (const int32_t i : group.parts) {
          const IndexView& index = problem.parts[i].index;
          keys += row_slots(index, b, h, slot / index.block_row);
        }
        costs.push_back((keys + 1) * (group.bounds[t + 1] - slot));
      }
    }
  }
  return costs;
}

void run_group(const FwdParams& params, const GroupPlan& group, const std::vector<Partial>& others,
               const Kernels& kernels, size_t scratch_bytes, const Pool& pool) {
  const Problem& problem = params.problem;
  const int64_t tiles = group.num_tiles();
  run_tiles(pool, tile_costs(problem, group), scratch_bytes, [&](int64_t i, std::byte* scratch) {
    const int64_t head = i / tiles;
    const int64_t t = tiles - 1 - i % tiles;
    const FwdTile tile{&params,
                       &group.group,
                       others.data(),
                       static_cast<int32_t>(others.size()),
                       head / problem.q_heads,
                       head % problem.q_heads,
                       group.bounds[t],
                       group.bounds[t + 1] - group.bounds[t]};
    kernels.forward(tile, scratch);
  });
}

// Rows of tokens that the writing group does not hold: other groups' results alone, or nothing.
void write_the_rest(const FwdParams& params, const GroupPlan& writer,
                    const std::vector<Partial>& others, const Kernels& kernels, const Pool& pool) {
  constexpr int64_t kTokens = 1024;
  const Problem& problem = params.problem;
  const int64_t runs = (problem.sq + kTokens - 1) / kTokens;
  const std::vector<int64_t> costs(problem.batch * problem.q_heads * runs, kTokens * 16);
  run_tiles(pool, costs, 0, [&](int64_t i, std::byte*) {
    const int64_t head = i / runs;
    const int64_t first = i % runs * kTokens;
    const FwdTile tile{&params,
                       &writer.group,
                       others.data(),
                       static_cast<int32_t>(others.size()),
                       head / problem.q_heads,
                       head % problem.q_heads,
                       first,
                       std::min(kTokens, problem.sq - first)};
    kernels.forward_rest(tile);
  });
}

}  // namespace

void run_plan(const FwdParams& params, const Kernels& kernels, size_t scratch_bytes,
              const Pool& pool) {
  const Problem& problem = params.problem;
  if (problem.batch * problem.q_heads * problem.sq == 0) return;
  std::vector<GroupPlan> groups = split_into_groups(problem);
  // The group with most slots writes the rows; the others leave compact partial results to merge.
  size_t writer = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto slots = [&](size_t i) { return groups[i].group.q_perm.token_of_slot.size; };
    if (slots(g) > slots(writer)) writer = g;
  }
  std::vector<Partial> others;
  for (size_t g = 0; g < groups.size(); ++g) {
    if (g == writer) continue;
    GroupPlan& group = groups[g];
    const int64_t slots = group.group.q_perm.token_of_slot.size;
    if (slots == 0) continue;
    const int64_t rows = problem.batch * problem.q_heads * slots;
    group.rows.reset(new float[rows * problem.head_dim_v]);
    group.log2_sum.reset(new float[rows]);
    group.group.partial = {group.rows.get(), group.log2_sum.get(), group.group.q_perm, slots};
    others.push_back(group.group.partial);
    run_group(params, group, {}, kernels, scratch_bytes, pool);
  }
  run_group(params, groups[writer], others, kernels, scratch_bytes, pool);
  write_the_rest(params, groups[writer], others, kernels, pool);
}

void forward(const FwdParams& params, Isa isa, const Pool& pool) {
  const Kernels kernels = select_kernels(isa, params.problem.dtype);
  run_plan(params, kernels, kernels.forward_scratch(params.problem), pool);
}

}  // namespace permattn::cpu
