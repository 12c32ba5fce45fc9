// The CPU operators of quantised attention and of what comes before it.
#include "cpu_common.h"
#include "prologue.h"

namespace permattn::binding {
namespace {

ScalarType result_dtype(Format format, const Tensor& x) {
  return format == Format::kNone  ? x.scalar_type()
         : format == Format::kFp8 ? ScalarType::Float8_e4m3fn
                                  : ScalarType::Char;
}

// `format` is a number of the Format enum. `rows` is [B, Hp, slots, D], `scales` [B, Hp, groups] or
// [B, Hp, groups, D], or anything where there are none.
void cpu_prepare(const Tensor& x, std::optional<Tensor> token_of_slot,
                 std::vector<Tensor> prologue_tensors, std::vector<int64_t> prologue_ints,
                 std::vector<double> prologue_floats, std::optional<Tensor> mean,
                 std::optional<Tensor> factor, int64_t format, int64_t rows_per_scale,
                 bool per_column, const Tensor& rows, const Tensor& scales, int64_t isa) {
  PrepareParams p = source_of(x, prologue_tensors, prologue_ints, prologue_floats);
  STD_TORCH_CHECK(format >= 0 && format <= 3 && rows_per_scale >= 1, "format: bad number");
  p.format = static_cast<Format>(format);
  p.rows_per_scale = rows_per_scale;
  p.per_column = per_column;
  STD_TORCH_CHECK(rows.dim() == 4 && rows.is_contiguous() && rows.size(0) == p.batch &&
                      rows.size(3) == p.dim && rows.scalar_type() == result_dtype(p.format, x),
                  "rows: wrong dtype or shape");
  p.out_heads = rows.size(1);
  p.slots = p.padded_slots = rows.size(2);
  STD_TORCH_CHECK(p.heads > 0 && p.out_heads % p.heads == 0, "rows: Hp must be a multiple of H");
  if (token_of_slot.has_value()) {
    p.token_of_slot = int_view_of(*token_of_slot, p.batch, p.out_heads, "token_of_slot");
    STD_TORCH_CHECK(p.token_of_slot.size == p.slots, "rows: wants a row a slot");
  }
  const int64_t places = p.batch * p.heads * p.dim;
  p.mean = optional_floats_of(mean, "mean", places);
  p.factor = optional_floats_of(factor, "factor", places);
  p.row_stride = p.scale_stride = p.dim;
  p.head_stride = p.slots * p.dim * static_cast<int64_t>(rows.element_size());
  p.rows = rows.data_ptr();
  if (p.format != Format::kNone) {
    const int64_t groups = (p.slots + rows_per_scale - 1) / rows_per_scale;
    const int64_t wanted = p.batch * p.out_heads * groups * (per_column ? p.dim : 1);
    floats_of(scales, "scales", wanted);
    p.scales = static_cast<float*>(scales.data_ptr());
  }
  cpu::prepare(p, isa_of(isa), torch_pool());
}

// sum, lowest and highest are [B, H, D]; `seen` is bool [1 or B, 1 or H, S].
void cpu_column_statistics(const Tensor& x, std::vector<Tensor> prologue_tensors,
                           std::vector<int64_t> prologue_ints, std::vector<double> prologue_floats,
                           std::optional<Tensor> seen, const Tensor& sum, const Tensor& lowest,
                           const Tensor& highest, int64_t isa) {
  ColumnParams c{};
  c.source = source_of(x, prologue_tensors, prologue_ints, prologue_floats);
  const PrepareParams& p = c.source;
  add_seen(c, seen);
  const int64_t places = p.batch * p.heads * p.dim;
  for (const Tensor* t : {&sum, &lowest, &highest}) floats_of(*t, "results", places);
  c.sum = static_cast<float*>(sum.data_ptr());
  c.lowest = static_cast<float*>(lowest.data_ptr());
  c.highest = static_cast<float*>(highest.data_ptr());
  cpu::column_statistics(c, isa_of(isa), torch_pool());
}

// The header of core.packing.pack_plan.
void read_spec(const std::vector<int64_t>& ints, QuantisedCall& call) {
  constexpr Format kQk[] = {Format::kNone, Format::kInt8, Format::kInt4};
  constexpr Format kPv[] = {Format::kNone, Format::kFp8, Format::kInt8, Format::kInt4};
  STD_TORCH_CHECK(
      ints.size() >= kHeaderInts && ints[0] >= 1 && ints[0] <= 2 && ints[1] >= 0 && ints[1] <= 3,
      "plan: wants a quantised qk");
  call.qk = kQk[ints[0]];
  call.pv = kPv[ints[1]];
  call.q_rows = ints[2];
  call.kv_rows = ints[3];
  STD_TORCH_CHECK(call.q_rows >= 1 && call.kv_rows >= 1 && call.kv_rows <= cpu::kMaxKeysPerScale,
                  "kv_rows_per_scale: wants 1 to ", cpu::kMaxKeysPerScale, ", got ", call.kv_rows);
}

void cpu_forward_quantised(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                           const Tensor& lse, std::vector<Tensor> plan_tensors,
                           std::vector<int64_t> plan_ints, std::vector<Tensor> prologue_tensors,
                           std::vector<int64_t> prologue_ints, std::vector<double> prologue_floats,
                           std::optional<Tensor> mean, std::optional<Tensor> k_factor,
                           std::optional<Tensor> q_factor, double scale, int64_t isa) {
  FwdParams params = forward_params_of(q, k, v, out, lse, scale);
  Problem& problem = params.problem;
  const std::vector<PlanPart> parts = parts_of(plan_tensors, plan_ints, problem);
  problem.parts = parts.data();
  problem.num_parts = static_cast<int32_t>(parts.size());
  QuantisedCall call{};
  read_spec(plan_ints, call);
  for (const PlanPart& part : parts) {
    // INT32_MAX stands for any longer block: there is one of it.
    const bool fits = part.index.block_col % call.kv_rows == 0;
    STD_TORCH_CHECK(fits || part.index.block_col == INT32_MAX,
                    "kv_rows_per_scale: must divide the plan's blocks of ", part.index.block_col,
                    ", got ", call.kv_rows);
  }
  const int64_t dim = problem.head_dim;
  const std::vector<Transform> transforms =
      transforms_of(prologue_tensors, prologue_ints, prologue_floats,
                    {{problem.q_heads, dim}, {problem.kv_heads, dim}});
  call.q_transform = transforms[0];
  call.k_transform = transforms[1];
  call.mean = optional_floats_of(mean, "mean", problem.batch * problem.kv_heads * dim);
  call.k_factor = optional_floats_of(k_factor, "k_factor", problem.batch * problem.kv_heads * dim);
  call.q_factor = optional_floats_of(q_factor, "q_factor", problem.batch * problem.q_heads * dim);
  cpu::forward_quantised(params, call, isa_of(isa), torch_pool());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(permattn_native, CPU, m) {
  m.impl("cpu_prepare", TORCH_BOX(&cpu_prepare));
  m.impl("cpu_column_statistics", TORCH_BOX(&cpu_column_statistics));
  m.impl("cpu_forward_quantised", TORCH_BOX(&cpu_forward_quantised));
}

}  // namespace permattn::binding
