#include "plan.h"

#include <algorithm>

namespace permattn::binding {
namespace {

PermView perm_view_of(const Tensor& token_of_slot, const Tensor& slot_of_token, int64_t num_tokens,
                      const Problem& problem, const char* name) {
  const PermView view{int_view_of(token_of_slot, problem.batch, problem.q_heads, name),
                      int_view_of(slot_of_token, problem.batch, problem.q_heads, name)};
  STD_TORCH_CHECK(view.slot_of_token.size == num_tokens, name, ": made for ",
                  view.slot_of_token.size, " tokens, got ", num_tokens);
  return view;
}

IndexView index_view_of(const Tensor* t, int64_t block_row, int64_t block_col,
                        const Problem& problem) {
  // A block longer than any sequence means the same as one that just holds it, and cannot overflow.
  constexpr int64_t kLongest = INT32_MAX;
  const IndexView index{int_view_of(t[0], problem.batch, problem.q_heads, "indices"),
                        int_view_of(t[1], problem.batch, problem.q_heads, "row_offsets"),
                        int_view_of(t[2], problem.batch, problem.q_heads, "num_full"),
                        std::min(block_row, kLongest), std::min(block_col, kLongest)};
  STD_TORCH_CHECK(index.row_offsets.size == index.num_full.size + 1,
                  "row_offsets: wants one column more than num_full, got ", index.row_offsets.size,
                  " and ", index.num_full.size);
  STD_TORCH_CHECK(block_row >= 1 && block_col >= 1, "block_q, block_kv: must be >= 1, got ",
                  block_row, ", ", block_col);
  return index;
}

}  // namespace

void add_transposed(std::vector<PlanPart>& parts, const std::vector<Tensor>& tensors,
                    const Problem& problem) {
  constexpr size_t kPerPart = 3;
  STD_TORCH_CHECK(tensors.size() == kPerPart * parts.size(),
                  "transposed: wants 3 tensors a part, got ", tensors.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    const IndexView& index = parts[i].index;
    parts[i].transposed =
        index_view_of(&tensors[kPerPart * i], index.block_col, index.block_row, problem);
  }
}

std::vector<PlanPart> parts_of(const std::vector<Tensor>& tensors, const std::vector<int64_t>& ints,
                               const Problem& problem) {
  const size_t num_parts = tensors.size() / kTensorsPerPart;
  STD_TORCH_CHECK(num_parts > 0 && tensors.size() == num_parts * kTensorsPerPart &&
                      ints.size() == kHeaderInts + num_parts * kIntsPerPart,
                  "plan: wants 7 tensors and 9 integers a part after 5 integers, got ",
                  tensors.size(), " tensors and ", ints.size(), " integers");
  std::vector<PlanPart> parts;
  int64_t num_groups = 0;
  for (size_t i = 0; i < num_parts; ++i) {
    const Tensor* t = &tensors[i * kTensorsPerPart];
    const int64_t* n = &ints[kHeaderInts + i * kIntsPerPart];
    PlanPart part{};
    part.q_perm = perm_view_of(t[0], t[1], problem.sq, problem, "q_perm");
    part.kv_perm = perm_view_of(t[2], t[3], problem.skv, problem, "kv_perm");
    part.index = index_view_of(t + 4, n[0], n[1], problem);
    part.band = band_of(n[2] != 0, n[3], n[4] != 0, n[5]);
    STD_TORCH_CHECK(n[8] >= 0 && n[8] <= num_groups, "plan: bad group number ", n[8]);
    num_groups = std::max(num_groups, n[8] + 1);
    part.group = static_cast<int32_t>(n[8]);
    parts.push_back(part);
  }
  return parts;
}

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  constexpr int64_t kMaxDim = 256;
  Problem problem{};
  problem.dtype = dtype_of(q);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v: want 4 axes");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "k, v: want q's dtype");
  problem.batch = q.size(0);
  problem.q_heads = q.size(1);
  problem.kv_heads = k.size(1);
  problem.sq = q.size(2);
  problem.skv = k.size(2);
  problem.head_dim = static_cast<int32_t>(q.size(3));
  problem.head_dim_v = static_cast<int32_t>(v.size(3));
  problem.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(k.size(0) == problem.batch && v.size(0) == problem.batch &&
                      v.size(1) == problem.kv_heads && v.size(2) == problem.skv &&
                      k.size(3) == q.size(3),
                  "q, k, v: shapes disagree");
  STD_TORCH_CHECK(problem.kv_heads > 0 && problem.q_heads % problem.kv_heads == 0,
                  "k: Hq % Hkv must be 0, got ", problem.q_heads, " and ", problem.kv_heads);
  STD_TORCH_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxDim && v.size(3) >= 1 && v.size(3) <= kMaxDim,
                  "head dim: wants 1 to 256, got D = ", q.size(3), ", Dv = ", v.size(3));
  STD_TORCH_CHECK(problem.sq <= INT32_MAX && problem.skv <= INT32_MAX, "S: wants less than 2^31");
  return problem;
}

}  // namespace permattn::binding
